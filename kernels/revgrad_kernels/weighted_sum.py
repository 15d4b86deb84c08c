"""The attention weighted sum of CrevNet, section 2.2: `y = (1 - g) x + g h` with the gate `g = sigmoid(a + b)`.

`a` are the gate logits as a convolution without bias returns them, and `b` is that convolution's bias, one number per
channel. Forward, inverse and backward are one pass over memory each; only the inputs are kept for backward.
"""

import math
from typing import Any

import torch
from torch import Tensor

from revgrad_kernels.backend import (
    arithmetic_dtype,
    can_run,
    check_floats,
    converted,
    on_device,
    refuse_gradient,
    tl,
    tl_dtype,
    triton,
    uses_triton,
)
from revgrad_kernels.layout import (
    Matrix,
    canonical,
    channels,
    channels_are_columns,
    elements,
    expanded,
    gapless,
    laid_out_like,
    size_class,
    tile,
    tiles_across,
    tuned,
)
from revgrad_kernels.recurrent import bias_gradient, biased, given, sigmoid

_NONE, _PER_ROW, _PER_COLUMN = 0, 1, 2
"""Where a kernel finds the bias of an element."""
_BIAS_TILE = 2048
"""Elements of a tile where partial sums are kept, whose number must not depend on a tuning."""


def weighted_sum(logits: Tensor, x: Tensor, h: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Blend two tensors by a gate: `(1 - g) * x + g * h` with `g = sigmoid(logits + bias)`.

    Args:
        logits: `[B, C, ...]` or broadcastable to it.
        x: `[B, C, ...]`; its dtype and memory layout are those of the result.
        h: As `logits`. Dtypes may be mixed; the arithmetic is in float32, or float64 where any input is.
        bias: `[C]`, optional.
        backend: `auto`, `triton` or `reference`; see `revgrad_kernels.backend`.

    Raises:
        ValueError: The shapes do not fit, or a tensor holds no floats.
        BackendError: The backend cannot compute this.
    """
    check_floats("weighted_sum", logits=logits, x=x, h=h, bias=bias)
    logits, h = _checked("weighted_sum", x, bias, logits=logits, h=h)
    if uses_triton(backend, logits, x, h, *given(bias), operator="weighted_sum"):
        return _weighted_sum(logits, x, h, bias)
    return _reference(logits, x, h, bias)


def weighted_sum_inverse(
    logits: Tensor, y: Tensor, h: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Recover `x` from `y = weighted_sum(logits, x, h, bias)`; arguments as there.

    The division by `1 - g` amplifies the rounding error of `y` by `1 / (1 - g)`; written as
    `y + (y - h) * exp(a)`, because `g / (1 - g) = exp(a)` has no cancellation near `g = 1`.
    """
    check_floats("weighted_sum_inverse", logits=logits, y=y, h=h, bias=bias)
    logits, h = _checked("weighted_sum_inverse", y, bias, logits=logits, h=h)
    if uses_triton(backend, logits, y, h, *given(bias), operator="weighted_sum_inverse"):
        return _weighted_sum_inverse(logits, y, h, bias)
    return _reference_inverse(logits, y, h, bias)


def weighted_sum_backward(
    logits: Tensor, x: Tensor, h: Tensor, grad: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the weighted sum with respect to `(logits, x, h)`, each in the dtype of its tensor.

    Args:
        logits: As in `weighted_sum`, the bias added.
        x: The tensor that was blended.
        h: What it was blended with.
        grad: Gradient with respect to the result.
        backend: As in `weighted_sum`.
    """
    check_floats("weighted_sum_backward", logits=logits, x=x, h=h, grad=grad)
    logits, h, grad = _checked("weighted_sum_backward", x, None, logits=logits, h=h, grad=grad)
    if uses_triton(backend, logits, x, h, grad, operator="weighted_sum_backward"):
        return _weighted_sum_backward(logits, x, h, grad, None)[:3]
    return _reference_backward(logits, x, h, grad, None)


def _reference(logits: Tensor, x: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
    wide = arithmetic_dtype(logits, x, h, bias)
    gate = torch.sigmoid(biased(logits, bias, wide))
    return converted(torch.lerp(converted(x, wide), converted(h, wide), gate), x.dtype)


def _reference_inverse(logits: Tensor, y: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
    wide = arithmetic_dtype(logits, y, h, bias)
    y_wide = converted(y, wide)
    # exp(a) as 2^(a log2(e)), in half the time that torch.exp takes on a CPU; a sum with alpha takes less than a
    # product with a number. The rounding of the exponent puts it off by |a| units in the last place, but y - h is so
    # small where that is large that the rounding of y always counts more.
    a = biased(logits, bias, wide)
    ratio = torch.add(a, a, alpha=math.log2(math.e) - 1).exp2_()
    return converted(torch.addcmul(y_wide, y_wide - converted(h, wide), ratio), y.dtype)


def _reference_backward(
    logits: Tensor, x: Tensor, h: Tensor, grad: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    wide = arithmetic_dtype(logits, x, h, bias)
    gate = torch.sigmoid(biased(logits, bias, wide))
    grad_wide = grad.to(wide)
    grad_h = grad_wide * gate
    grad_logits = (h.to(wide) - x.to(wide)) * grad_wide * (gate * (1 - gate))
    return grad_logits.to(logits.dtype), (grad_wide - grad_h).to(x.dtype), grad_h.to(h.dtype)


@triton.jit(do_not_specialize=["size"])
def _forward_kernel(
    logits_ptr, x_ptr, h_ptr, bias_ptr, y_ptr, rows, columns, channel_count, size,
    INVERSE: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, column, mask = tile(rows, columns, TILE, WIDTH)
    offset = row * columns + column
    logits = _biased_logits(logits_ptr, bias_ptr, offset, row, column, mask, channel_count, BIAS, WIDE)
    x = tl.load(x_ptr + offset, mask, other=0).to(WIDE)
    h = tl.load(h_ptr + offset, mask, other=0).to(WIDE)
    if INVERSE:
        y = x + (x - h) * tl.exp(logits)
    else:
        gate = sigmoid(logits)
        # From the nearer end, so that a gate of 0 or 1 returns x or h and not something rounded.
        y = tl.where(gate < 0.5, x + gate * (h - x), h - (1 - gate) * (h - x))
    tl.store(y_ptr + offset, y, mask)


@triton.jit(do_not_specialize=["size"])
def _backward_kernel(
    logits_ptr, x_ptr, h_ptr, bias_ptr, grad_ptr, grad_logits_ptr, grad_x_ptr, grad_h_ptr, partial_ptr,
    rows, columns, channel_count, size,
    BIAS: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, column, mask = tile(rows, columns, TILE, WIDTH)
    offset = row * columns + column
    logits = _biased_logits(logits_ptr, bias_ptr, offset, row, column, mask, channel_count, BIAS, WIDE)
    x = tl.load(x_ptr + offset, mask, other=0).to(WIDE)
    h = tl.load(h_ptr + offset, mask, other=0).to(WIDE)
    grad = tl.load(grad_ptr + offset, mask, other=0).to(WIDE)
    gate = sigmoid(logits)
    grad_h = grad * gate
    grad_logits = (h - x) * grad_h * (1 - gate)
    tl.store(grad_logits_ptr + offset, grad_logits, mask)
    tl.store(grad_x_ptr + offset, grad - grad_h, mask)
    tl.store(grad_h_ptr + offset, grad_h, mask)
    # A program writes the sums of its own tile, where nobody else writes: the same bits in every run.
    program, across = tl.program_id(0).to(tl.int64), tiles_across(columns, WIDTH)
    if BIAS == 1:
        tl.store(partial_ptr + (program % across) * rows + row, tl.sum(grad_logits, 1)[:, None], row < rows)
    if BIAS == 2:
        tl.store(
            partial_ptr + (program // across) * columns + column, tl.sum(grad_logits, 0)[None, :], column < columns
        )


@triton.jit
def _biased_logits(
    logits_ptr, bias_ptr, offset, row, column, mask, channel_count, BIAS: tl.constexpr, WIDE: tl.constexpr
):
    logits = tl.load(logits_ptr + offset, mask, other=0).to(WIDE)
    if BIAS == 1:
        logits += tl.load(bias_ptr + row % channel_count).to(WIDE)
    if BIAS == 2:
        logits += tl.load(bias_ptr + column, column < channel_count, other=0).to(WIDE)
    return logits


_forward_tuned = tuned(_forward_kernel)
_backward_tuned = tuned(_backward_kernel)


def _launch_forward(logits: Tensor, x: Tensor, h: Tensor, bias: Tensor | None, inverse: bool) -> Tensor:
    x = canonical(x)
    logits, h, bias = laid_out_like(x, logits), laid_out_like(x, h), gapless(bias)
    y = torch.empty_like(x)
    if x.numel():
        matrix, where = _layout(x, bias)
        with on_device(x):
            _forward_tuned[matrix.grid](
                logits, x, h, bias, y, matrix.rows, matrix.columns, x.shape[1] if where else 1, size_class(x.numel()),
                INVERSE=inverse, BIAS=where, WIDE=tl_dtype(logits, x, h, bias), WIDTH=matrix.width,
            )  # fmt: skip
    return y


def _launch_backward(
    logits: Tensor, x: Tensor, h: Tensor, grad: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = canonical(x)
    logits, h, grad = (laid_out_like(x, t) for t in (logits, h, grad))
    bias = gapless(bias)
    grads = torch.empty_like(logits), torch.empty_like(x), torch.empty_like(h)
    matrix, where = _layout(x, bias)
    wide = arithmetic_dtype(logits, x, h, bias)
    across, down = triton.cdiv(matrix.columns, matrix.width), triton.cdiv(matrix.rows, _BIAS_TILE // matrix.width)
    shape = {_NONE: (0,), _PER_ROW: (across, matrix.rows), _PER_COLUMN: (down, matrix.columns)}[where]
    partial = x.new_empty(shape, dtype=wide)
    if x.numel():
        kernel = _backward_kernel if where else _backward_tuned
        meta = {"TILE": _BIAS_TILE, "num_warps": 8} if where else {}
        with on_device(x):
            kernel[matrix.grid](
                logits, x, h, bias, grad, *grads, partial,
                matrix.rows, matrix.columns, x.shape[1] if where else 1, size_class(x.numel()),
                BIAS=where, WIDE=tl_dtype(logits, x, h, bias), WIDTH=matrix.width, **meta,
            )  # fmt: skip
    if bias is None:
        return (*grads, partial)
    if where == _PER_ROW:
        partial = partial.view(-1, x.shape[0], x.shape[1]).sum(1) if x.numel() else partial.view(0, x.shape[1])
    return (*grads, partial.sum(0).to(bias.dtype))


def _layout(x: Tensor, bias: Tensor | None) -> tuple[Matrix, int]:
    if bias is None:
        return elements(x), _NONE
    return channels(x), _PER_COLUMN if channels_are_columns(x) else _PER_ROW


@torch.library.custom_op("revgrad::weighted_sum", mutates_args=())
def _weighted_sum(logits: Tensor, x: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
    if can_run(x.device):
        return _launch_forward(logits, x, h, bias, inverse=False)
    return laid_out_like(canonical(x), _reference(logits, x, h, bias))


@torch.library.custom_op("revgrad::weighted_sum_inverse", mutates_args=())
def _weighted_sum_inverse(logits: Tensor, y: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
    if can_run(y.device):
        return _launch_forward(logits, y, h, bias, inverse=True)
    return laid_out_like(canonical(y), _reference_inverse(logits, y, h, bias))


@torch.library.custom_op("revgrad::weighted_sum_backward", mutates_args=())
def _weighted_sum_backward(
    logits: Tensor, x: Tensor, h: Tensor, grad: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if can_run(x.device):
        return _launch_backward(logits, x, h, grad, bias)
    like = canonical(x)
    grads = _reference_backward(logits, x, h, grad, bias)
    grad_logits, grad_x, grad_h = (laid_out_like(like, g).clone() for g in grads)
    return grad_logits, grad_x, grad_h, _bias_grad(grad_logits, bias, arithmetic_dtype(logits, x, h, bias))


@_weighted_sum.register_fake
@_weighted_sum_inverse.register_fake
def _(logits: Tensor, x: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(canonical(x))


@_weighted_sum_backward.register_fake
def _(logits: Tensor, x: Tensor, h: Tensor, grad: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = canonical(x)
    grad_bias = x.new_empty(0, dtype=arithmetic_dtype(logits, x, h, bias)) if bias is None else torch.empty_like(bias)
    grad_logits, grad_x, grad_h = (torch.empty_like(laid_out_like(x, t)) for t in (logits, x, h))
    return grad_logits, grad_x, grad_h, grad_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, x, h, bias = ctx.saved_tensors
    grad_logits, grad_x, grad_h, grad_bias = _weighted_sum_backward(logits, x, h, grad, bias)
    return grad_logits, grad_x, grad_h, None if bias is None else grad_bias


def _inverse_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, y, h, bias = ctx.saved_tensors
    wide = arithmetic_dtype(logits, y, h, bias)
    grad_h = -grad.to(wide) * torch.exp(biased(logits, bias, wide))
    grad_logits = (h.to(wide) - y.to(wide)) * grad_h
    grad_bias = bias_gradient(bias, grad_logits, wide)
    return grad_logits.to(logits.dtype), (grad - grad_h).to(y.dtype), grad_h.to(h.dtype), grad_bias


_weighted_sum.register_autograd(_backward, setup_context=_save)
_weighted_sum_inverse.register_autograd(_inverse_backward, setup_context=_save)
refuse_gradient(_weighted_sum_backward)


def _bias_grad(grad_logits: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    found = bias_gradient(bias, grad_logits, dtype)
    return grad_logits.new_empty(0, dtype=dtype) if found is None else found  # an operator returns tensors


def _checked(operator: str, x: Tensor, bias: Tensor | None, **tensors: Tensor) -> tuple[Tensor, ...]:
    if bias is not None and (x.ndim < 2 or bias.shape != x.shape[1:2]):
        raise ValueError(
            f"{operator}: the bias must have one element per channel of {tuple(x.shape)}, got {tuple(bias.shape)}"
        )
    return expanded(operator, x, **tensors)
