"""The weighted sum `y = (1 - g) x + g h`, `g = sigmoid(a)`, on a fixed-point grid, with a bit-exact inverse.

`1 - g` is rounded to `n / 2^16`, `1 <= n <= 2^16`, and `g h` to the grid of `x`. What the scaling of `x` forgets goes
to a reservoir, see `revgrad_kernels.reservoir`.

Undo an update with the backend, the device and the dtypes that made it: implementations of the exponential differ in
the last bit, and with it now and then `n`.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from revgrad_kernels.backend import can_run, check_floats, converted, on_device, refuse_gradient, tl, tl_dtype, triton
from revgrad_kernels.exact_additive import FRACTION_BITS, broadcast_to_grid, dispatch, line, nearest_integer
from revgrad_kernels.layout import canonical, elements, laid_out_like, size_class, tuned
from revgrad_kernels.reservoir import (
    FULL,
    GATE_BITS,
    check_reservoirs,
    pop,
    push,
    quantised_rest,
    refill_of,
    to_numerator,
)

_Tensors = TypeVar("_Tensors", bound=tuple[Tensor, ...])

_SAME_GATES = {"enable_fp_fusion": False}
"""How every kernel here is compiled: a compiler that is free to contract products and sums may do so in one kernel and
not in another, and the gate must come out the same in all of them."""


def exact_weighted_sum(
    logits: Tensor, x: Tensor, h: Tensor, reservoir: Tensor, level: Tensor, costs: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scale `x` by the gate exactly, and add `g h`.

    Args:
        logits: `[...]` or broadcastable to it, any float dtype. Where NaN, so is the result, and `n` is 1.
        x: `[...]`, grid values in float32 or float64 (see `revgrad_kernels.exact_additive`). Where not finite, the
            result is NaN, which has no inverse.
        h: As `logits`.
        reservoir: int64 `[numel]`, one per element of `x` in row-major order, below `2^(30 + level / 512)`.
        level: int16 `[numel]` in `0 .. FULL - 1`.
        costs: int16 `[2^16 + 1]`, `level_costs` of the device.
        backend: `auto`, `triton` or `reference`; see `revgrad_kernels.backend`.

    Returns:
        `(y, reservoir, level, word, spilled)`: the weighted sum, contiguous, off by less than two grid steps; the new
        reservoirs and levels; and, `[numel]` each, the low 16 bits of every reservoir as int16, and where they have
        left it. Gradients reach `logits`, `x` and `h` straight through the rounding.

    Raises:
        ValueError: The shapes do not fit, or a dtype; that of `x` must have a grid.
        BackendError: The backend cannot compute this.
    """
    check_floats("exact_weighted_sum", logits=logits, x=x, h=h)
    check_reservoirs("exact_weighted_sum", x, reservoir=reservoir, level=level, costs=costs)
    logits, h = broadcast_to_grid("exact_weighted_sum", x, logits=logits, h=h)
    return dispatch(_exact_weighted_sum, _reference, backend, (logits, x, h, reservoir, level, costs))


def exact_weighted_sum_refill(
    logits: Tensor, y: Tensor, level: Tensor, costs: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Which elements `exact_weighted_sum` spilled: what its inverse needs to know first.

    Args:
        logits: As in the forward pass.
        y: Its result, of which only shape and dtype matter here.
        level: int16 `[numel]`, as the forward pass left it.
        costs: As in the forward pass.
        backend: As in the forward pass.

    Returns:
        The levels before the forward pass, and its `spilled`.
    """
    check_floats("exact_weighted_sum_refill", logits=logits, y=y)
    check_reservoirs("exact_weighted_sum_refill", y, level=level, costs=costs)
    (logits,) = broadcast_to_grid("exact_weighted_sum_refill", y, logits=logits)
    return dispatch(_exact_weighted_sum_refill, _reference_refill, backend, (logits, y, level, costs))


def exact_weighted_sum_inverse(
    logits: Tensor, y: Tensor, h: Tensor, reservoir: Tensor, word: Tensor, refill: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Undo `exact_weighted_sum`, bit for bit.

    Args:
        logits: As in the forward pass.
        y: Its result.
        h: As in the forward pass.
        reservoir: int64 `[numel]`, as the forward pass left it.
        word: int16 `[numel]`, its `word`; read only where `refill`.
        refill: bool `[numel]`, as `exact_weighted_sum_refill` returns it.
        backend: As in the forward pass.

    Returns:
        `x` and the reservoirs before the forward pass. Not differentiable: the engine needs the gradient of the
        forward pass.
    """
    check_floats("exact_weighted_sum_inverse", logits=logits, y=y, h=h)
    check_reservoirs("exact_weighted_sum_inverse", y, reservoir=reservoir, word=word, refill=refill)
    logits, h = broadcast_to_grid("exact_weighted_sum_inverse", y, logits=logits, h=h)
    tensors = logits, y, h, reservoir, word, refill
    return dispatch(_exact_weighted_sum_inverse, _reference_inverse, backend, tensors)


def exact_weighted_sum_backward(
    logits: Tensor, x: Tensor, h: Tensor, grad: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Straight-through gradients of the exact weighted sum with respect to `(logits, x, h)`, in their dtypes.

    Those of `x` and `h` are the gradient times the rounded `1 - g` and `g`; that of the logits is the slope of the
    sigmoid, which is not rounded.

    Args:
        logits: As in `exact_weighted_sum`.
        x: The tensor that was blended.
        h: What it was blended with.
        grad: Gradient with respect to the result.
        backend: As in `exact_weighted_sum`.
    """
    check_floats("exact_weighted_sum_backward", logits=logits, x=x, h=h, grad=grad)
    logits, h, grad = broadcast_to_grid("exact_weighted_sum_backward", x, logits=logits, h=h, grad=grad)
    return dispatch(_exact_weighted_sum_backward, _reference_backward, backend, (logits, x, h, grad))


def _reference(
    logits: Tensor, x: Tensor, h: Tensor, reservoir: Tensor, level: Tensor, costs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    steps = _steps(x)
    rest = quantised_rest(_gate(logits, x.dtype))
    value = x.flatten().mul(steps).to(torch.int64)
    scaled, *after = push(value, to_numerator(rest).flatten(), reservoir, level, costs)
    y = scaled.to(x.dtype).view(x.shape).add_(_shift(rest, h, steps)).mul_(1 / steps)
    y.add_(x, alpha=0)  # as in the kernel
    return (y, *after)  # type: ignore[return-value]


def _reference_refill(logits: Tensor, y: Tensor, level: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    return refill_of(to_numerator(quantised_rest(_gate(logits, y.dtype))).flatten(), level, costs)


def _reference_inverse(
    logits: Tensor, y: Tensor, h: Tensor, reservoir: Tensor, word: Tensor, refill: Tensor
) -> tuple[Tensor, Tensor]:
    steps = _steps(y)
    rest = quantised_rest(_gate(logits, y.dtype))
    numerator = to_numerator(rest).flatten()
    scaled = (y.contiguous() * steps).sub_(_shift(rest, h, steps)).to(torch.int64)
    value, reservoir = pop(scaled.flatten(), numerator, reservoir, word, refill)
    return value.to(y.dtype).view(y.shape).mul_(1 / steps), reservoir


def _reference_backward(logits: Tensor, x: Tensor, h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, grad = _gate(logits, x.dtype), converted(grad, x.dtype)
    grad_h = _times(torch.rsub(quantised_rest(gate), 1, alpha=2.0**-GATE_BITS), grad)
    slope = torch.rsub(gate, 1).mul_(gate)
    grad_logits = _times(converted(h, x.dtype) - x, grad).mul_(slope)
    return converted(grad_logits, logits.dtype), grad - grad_h, converted(grad_h, h.dtype)


def _times(x: Tensor, grad: Tensor) -> Tensor:
    """`x grad` in the place of `x`, unless the gradient is batched."""
    return x * grad if torch._C._functorch.is_legacy_batchedtensor(grad) else x.mul_(grad)


def _gate(logits: Tensor, dtype: torch.dtype) -> Tensor:
    # Contiguous, because on a CPU the last bits of a sigmoid depend on the strides.
    return torch.sigmoid(converted(logits, dtype).contiguous())


def _shift(rest: Tensor, h: Tensor, steps: float) -> Tensor:
    """`g h` in grid steps, rounded; takes the place of `rest`."""
    return rest.mul_(-steps * 2.0**-GATE_BITS).add_(steps).mul_(h).round_()


def _steps(x: Tensor) -> float:
    """Grid steps per one."""
    return 2.0 ** FRACTION_BITS[x.dtype]


@triton.jit(do_not_specialize=["size"])
def _forward_kernel(
    logits_ptr, x_ptr, h_ptr, reservoir_ptr, level_ptr, costs_ptr,
    y_ptr, new_reservoir_ptr, new_level_ptr, word_ptr, spilled_ptr, numel, size,
    FULL_LEVEL: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    offset, mask = line(numel, TILE)
    rest, numerator = _rest_and_numerator(_sigmoid(logits_ptr, offset, mask, WIDE))
    shift = nearest_integer((_rounded_gate(rest, STEPS) * tl.load(h_ptr + offset, mask, other=0)).to(WIDE))
    x = tl.load(x_ptr + offset, mask, other=0)
    shift += x - x  # nothing, or NaN where x is not finite, which no integer says
    value = (x * STEPS).to(tl.int64)
    remaining, digit = _divide(tl.load(reservoir_ptr + offset, mask, other=0), numerator, 1)
    product = value * numerator.to(tl.int64) + digit
    reservoir = (remaining << 16) | (product & 0xFFFF)
    level = tl.load(level_ptr + offset, mask, other=0) + tl.load(costs_ptr + numerator.to(tl.int32))
    spilled = level >= FULL_LEVEL
    tl.store(y_ptr + offset, ((product >> 16).to(WIDE) + shift) * (1 / STEPS), mask)
    tl.store(new_reservoir_ptr + offset, tl.where(spilled, reservoir >> 16, reservoir), mask)
    tl.store(new_level_ptr + offset, tl.where(spilled, level - FULL_LEVEL, level), mask)
    tl.store(word_ptr + offset, reservoir.to(tl.int16), mask)
    tl.store(spilled_ptr + offset, spilled, mask)


@triton.jit(do_not_specialize=["size"])
def _refill_kernel(
    logits_ptr, level_ptr, costs_ptr, new_level_ptr, refill_ptr, numel, size,
    FULL_LEVEL: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    offset, mask = line(numel, TILE)
    _, numerator = _rest_and_numerator(_sigmoid(logits_ptr, offset, mask, WIDE))
    level = tl.load(level_ptr + offset, mask, other=0) - tl.load(costs_ptr + numerator.to(tl.int32))
    tl.store(new_level_ptr + offset, tl.where(level < 0, level + FULL_LEVEL, level), mask)
    tl.store(refill_ptr + offset, level < 0, mask)


@triton.jit(do_not_specialize=["size"])
def _inverse_kernel(
    logits_ptr, y_ptr, h_ptr, reservoir_ptr, word_ptr, refill_ptr, x_ptr, new_reservoir_ptr, numel, size,
    DIGITS: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    offset, mask = line(numel, TILE)
    rest, numerator = _rest_and_numerator(_sigmoid(logits_ptr, offset, mask, WIDE))
    shift = nearest_integer((_rounded_gate(rest, STEPS) * tl.load(h_ptr + offset, mask, other=0)).to(WIDE))
    scaled = (tl.load(y_ptr + offset, mask, other=0) * STEPS - shift).to(tl.int64)
    reservoir = tl.load(reservoir_ptr + offset, mask, other=0)
    refill = tl.load(refill_ptr + offset, mask, other=0)
    word = tl.load(word_ptr + offset, mask & refill, other=0).to(tl.int64) & 0xFFFF
    reservoir = tl.where(refill, (reservoir << 16) | word, reservoir)
    product = (scaled << 16) | (reservoir & 0xFFFF)
    # Rounded down: -1 - w, not negative where w is, has the quotient -1 - q.
    sign = product >> 63
    quotient, _ = _divide(product ^ sign, numerator, DIGITS)
    value = quotient ^ sign
    remaining = (reservoir >> 16) - value
    tl.store(x_ptr + offset, value.to(WIDE) * (1 / STEPS), mask)
    tl.store(new_reservoir_ptr + offset, remaining * numerator.to(tl.int64) + product, mask)


@triton.jit(do_not_specialize=["size"])
def _backward_kernel(
    logits_ptr, x_ptr, h_ptr, grad_ptr, grad_logits_ptr, grad_x_ptr, grad_h_ptr, numel, size,
    WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    offset, mask = line(numel, TILE)
    gate = _sigmoid(logits_ptr, offset, mask, WIDE)
    rest, _ = _rest_and_numerator(gate)
    x = tl.load(x_ptr + offset, mask, other=0)
    h = tl.load(h_ptr + offset, mask, other=0).to(WIDE)
    grad = tl.load(grad_ptr + offset, mask, other=0).to(WIDE)
    grad_h = _rounded_gate(rest, 1.0) * grad
    tl.store(grad_logits_ptr + offset, (h - x) * grad * (gate * (1 - gate)), mask)
    tl.store(grad_x_ptr + offset, grad - grad_h, mask)
    tl.store(grad_h_ptr + offset, grad_h, mask)


@triton.jit
def _sigmoid(logits_ptr, offset, mask, WIDE: tl.constexpr):
    return 1 / (1 + tl.exp(-tl.load(logits_ptr + offset, mask, other=0).to(WIDE)))


@triton.jit
def _rest_and_numerator(gate):
    """`2^16 (1 - gate)` rounded, at least 1: as a float, NaN where the gate is, and as an integer, 1 there."""
    rest = nearest_integer((1 - gate) * 65536)
    return tl.where(rest < 1, 1, rest), tl.where(rest >= 1, rest, 1).to(tl.int32).to(tl.uint32)


@triton.jit
def _rounded_gate(rest, STEPS: tl.constexpr):
    """The gate that `rest` belongs to, in units of `1 / STEPS`."""
    return STEPS - rest * (STEPS / 65536)


@triton.jit
def _divide(value, divisor, DIGITS: tl.constexpr):
    """Quotient and remainder of an int64 in `0 .. 2^(30 + 16 DIGITS) - 1` by a uint32 in `1 .. 2^16`.

    By hand, in radix 2^16: a GPU divides 32-bit integers several times faster than 64-bit ones.
    """
    rest = (value >> 16 * DIGITS).to(tl.uint32)
    digit = rest // divisor
    rest -= digit * divisor
    quotient = digit.to(tl.int64)
    for i in tl.static_range(1, DIGITS + 1):
        rest = (rest << 16) | ((value >> 16 * (DIGITS - i)).to(tl.uint32) & 0xFFFF)
        digit = rest // divisor
        rest -= digit * divisor
        quotient = (quotient << 16) | digit.to(tl.int64)
    return quotient, rest.to(tl.int64)


_forward_tuned = tuned(_forward_kernel)
_refill_tuned = tuned(_refill_kernel)
_inverse_tuned = tuned(_inverse_kernel)
_backward_tuned = tuned(_backward_kernel)


def _launch(kernel: Any, x: Tensor, inputs: Sequence[Tensor], outputs: _Tensors, **constants: Any) -> _Tensors:
    numel = x.numel()
    if numel:
        with on_device(x):
            kernel[elements(x).grid](
                *inputs, *outputs, numel, size_class(numel), **constants, WIDE=tl_dtype(x), **_SAME_GATES
            )
    return outputs


def _row_major(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _forward_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    reservoir, level = (x.new_empty(x.numel(), dtype=dtype) for dtype in (torch.int64, torch.int16))
    return x.new_empty(x.shape), reservoir, level, torch.empty_like(level), torch.empty_like(level, dtype=torch.bool)


def _refill_outputs(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.numel(), dtype=torch.int16), y.new_empty(y.numel(), dtype=torch.bool)


def _inverse_outputs(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.numel(), dtype=torch.int64)


def _backward_outputs(logits: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = canonical(x)
    grad_logits, grad_x, grad_h = (torch.empty_like(laid_out_like(x, t)) for t in (logits, x, h))
    return grad_logits, grad_x, grad_h


@torch.library.custom_op("revgrad::exact_weighted_sum", mutates_args=())
def _exact_weighted_sum(
    logits: Tensor, x: Tensor, h: Tensor, reservoir: Tensor, level: Tensor, costs: Tensor, kernel: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if kernel and can_run(x.device):
        inputs = _row_major(logits, x, h, reservoir, level, costs)
        return _launch(_forward_tuned, x, inputs, _forward_outputs(x), FULL_LEVEL=FULL, STEPS=_steps(x))
    return _reference(logits, x, h, reservoir, level, costs)


@torch.library.custom_op("revgrad::exact_weighted_sum_refill", mutates_args=())
def _exact_weighted_sum_refill(
    logits: Tensor, y: Tensor, level: Tensor, costs: Tensor, kernel: bool
) -> tuple[Tensor, Tensor]:
    if kernel and can_run(y.device):
        inputs = _row_major(logits, level, costs)
        return _launch(_refill_tuned, y, inputs, _refill_outputs(y), FULL_LEVEL=FULL)
    return _reference_refill(logits, y, level, costs)


@torch.library.custom_op("revgrad::exact_weighted_sum_inverse", mutates_args=())
def _exact_weighted_sum_inverse(
    logits: Tensor, y: Tensor, h: Tensor, reservoir: Tensor, word: Tensor, refill: Tensor, kernel: bool
) -> tuple[Tensor, Tensor]:
    if kernel and can_run(y.device):
        inputs = _row_major(logits, y, h, reservoir, word, refill)
        # A grid value times 2^16 has 40 bits in float32 and 62 in float64.
        digits = 1 if y.dtype == torch.float32 else 2
        return _launch(_inverse_tuned, y, inputs, _inverse_outputs(y), DIGITS=digits, STEPS=_steps(y))
    return _reference_inverse(logits, y, h, reservoir, word, refill)


@torch.library.custom_op("revgrad::exact_weighted_sum_backward", mutates_args=())
def _exact_weighted_sum_backward(
    logits: Tensor, x: Tensor, h: Tensor, grad: Tensor, kernel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    like = canonical(x)
    if kernel and can_run(x.device):
        inputs = [laid_out_like(like, t) for t in (logits, x, h, grad)]
        return _launch(_backward_tuned, x, inputs, _backward_outputs(logits, x, h))
    grad_logits, grad_x, grad_h = (laid_out_like(like, g) for g in _reference_backward(logits, x, h, grad))
    return grad_logits, grad_x, grad_h


_exact_weighted_sum.register_fake(lambda logits, x, h, reservoir, level, costs, kernel: _forward_outputs(x))
_exact_weighted_sum_refill.register_fake(lambda logits, y, level, costs, kernel: _refill_outputs(y))
_exact_weighted_sum_inverse.register_fake(lambda logits, y, h, reservoir, word, refill, kernel: _inverse_outputs(y))
_exact_weighted_sum_backward.register_fake(lambda logits, x, h, grad, kernel: _backward_outputs(logits, x, h))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.kernel = inputs[-1]


def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return *_exact_weighted_sum_backward(*ctx.saved_tensors, grad, ctx.kernel), None, None, None, None


_exact_weighted_sum.register_autograd(_backward, setup_context=_save)
refuse_gradient(_exact_weighted_sum_inverse, "differentiate exact_weighted_sum, or use weighted_sum_inverse")
refuse_gradient(_exact_weighted_sum_backward, "rounding has no second derivative; use weighted_sum")
