"""The additive coupling on a fixed-point grid: plus a message rounded to the grid, and minus it again, bit for bit.

A grid value is a float that is an integer multiple of `2^-16` (float32) or `2^-32` (float64), small enough for the
mantissa to hold that integer. Sums of grid values that stay as small are exact. Gradients pass straight through the
rounding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revgrad_kernels.backend import (
    BackendError,
    can_run,
    check_floats,
    converted,
    on_device,
    tl,
    tl_dtype,
    transformed,
    triton,
    uses_triton,
)
from revgrad_kernels.layout import canonical, elements, expanded, laid_out_like, size_class, tuned

FRACTION_BITS = {torch.float32: 16, torch.float64: 32}
"""The grid of a dtype: multiples of `2^-fraction_bits`."""


def exact_additive(target: Tensor, message: Tensor, *, backend: str = "auto") -> Tensor:
    """`target + message`, the message rounded to the nearest grid value, ties to even.

    Args:
        target: `[...]`, grid values in float32 or float64.
        message: Any float dtype and a shape that broadcasts to the target's. Its memory layout is that of the result.
        backend: `auto`, `triton` or `reference`; see `revgrad_kernels.backend`. The bits are the same in both.

    Raises:
        ValueError: The shapes do not fit, the target's dtype has no grid, or the message holds no floats.
        BackendError: The backend cannot compute this.
    """
    check_floats("exact_additive", target=target, message=message)
    return _sum("exact_additive", target, message, False, backend)


def exact_additive_inverse(merged: Tensor, message: Tensor, *, backend: str = "auto") -> Tensor:
    """Recover `target`, every bit of it, from `merged = exact_additive(target, message)`; arguments as there."""
    check_floats("exact_additive_inverse", merged=merged, message=message)
    return _sum("exact_additive_inverse", merged, message, True, backend)


def _sum(name: str, target: Tensor, message: Tensor, undo: bool, backend: str) -> Tensor:
    (message,) = broadcast_to_grid(name, target, message=message)
    return dispatch(_exact_additive, _reference, backend, (target, message), undo)


def broadcast_to_grid(operator: str, x: Tensor, **tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, each broadcast to the shape of the grid values `x`.

    Raises:
        ValueError: One does not broadcast, or the dtype of `x` has no grid; names the operator.
        BackendError: Inside of a transform of functions or of forward-mode differentiation, which see no slope where
            something is rounded.
    """
    if transformed(x, *tensors.values()):
        raise BackendError(
            f"{operator}: neither torch.func (grad, vmap, jvp) nor forward-mode differentiation knows exact "
            "arithmetic: choose arithmetic='float', or an operator that does not round"
        )
    if x.dtype not in FRACTION_BITS:
        raise ValueError(f"{operator}: grid values are float32 or float64, not {x.dtype}")
    if all(t.shape == x.shape for t in tensors.values()):
        return tuple(tensors.values())
    return expanded(operator, x, **tensors)


def dispatch(
    operator: Callable[..., Any], reference: Callable[..., Any], backend: str, tensors: tuple[Tensor, ...], *flags: bool
) -> Any:
    """Call a registered operator, or its reference where nobody would notice that it is left out.

    What is compiled gets the operator too: a compiler that rewrites the reference may round a gate another way than
    the uncompiled inverse does. The reference is not differentiable, rounding having no slope; the operator is.
    """
    kernel = uses_triton(backend, *tensors)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if kernel or recorded or torch.compiler.is_compiling():
        return operator(*tensors, *flags, kernel)
    return reference(*tensors, *flags)


def _reference(target: Tensor, message: Tensor, undo: bool) -> Tensor:
    bits = FRACTION_BITS[target.dtype]
    steps = (converted(message, target.dtype) * 2.0**bits).round_()
    return torch.add(target, steps, alpha=-(2.0**-bits) if undo else 2.0**-bits, out=steps)


@triton.jit
def line(numel, TILE: tl.constexpr):
    """The elements of this program and their mask, in 64 bits."""
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    return offset, offset < numel


@triton.jit
def nearest_integer(x):
    """Ties to even, as `torch.round`; Triton has no such function that its interpreter knows as well.

    From the limit to its double, floats are the integers: adding the limit to a smaller number rounds to one, and keeps
    parity as the limit is even. Infinities, NaN and numbers from the limit on, all integers, stay as they are, and so
    do zeros for their sign.
    """
    LIMIT: tl.constexpr = 2.0**23 if x.dtype == tl.float32 else 2.0**52
    size = tl.abs(x)
    # A product, because minus may be a difference from zero: that has no negative zero.
    rounded = ((size + LIMIT) - LIMIT) * tl.where(x < 0, -1.0, 1.0).to(x.dtype)
    return tl.where((size > 0) & (size < LIMIT), rounded, x)


@triton.jit(do_not_specialize=["size"])
def _sum_kernel(
    target_ptr, message_ptr, sum_ptr, numel, size,
    UNDO: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    offset, mask = line(numel, TILE)
    target = tl.load(target_ptr + offset, mask, other=0)
    message = tl.load(message_ptr + offset, mask, other=0).to(WIDE)
    rounded = nearest_integer(message * STEPS) * (1 / STEPS)
    tl.store(sum_ptr + offset, target - rounded if UNDO else target + rounded, mask)


_sum_tuned = tuned(_sum_kernel)


def _launch(target: Tensor, message: Tensor, undo: bool) -> Tensor:
    message = canonical(message)
    target = laid_out_like(message, target)
    result = torch.empty_like(target)
    if result.numel():
        with on_device(result):
            # Contraction of products and sums is harmless here: every product is by a power of two, hence exact.
            _sum_tuned[elements(result).grid](
                target, message, result, result.numel(), size_class(result.numel()),
                UNDO=undo, STEPS=2.0 ** FRACTION_BITS[target.dtype], WIDE=tl_dtype(target),
            )  # fmt: skip
    return result


@torch.library.custom_op("revgrad::exact_additive", mutates_args=())
def _exact_additive(target: Tensor, message: Tensor, undo: bool, kernel: bool) -> Tensor:
    if kernel and can_run(target.device):
        return _launch(target, message, undo)
    return _reference(target, canonical(message), undo)


@_exact_additive.register_fake
def _(target: Tensor, message: Tensor, undo: bool, kernel: bool) -> Tensor:
    return torch.empty_like(canonical(message), dtype=target.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, message, ctx.undo, _ = inputs
    ctx.dtype = message.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    message_grad = grad.to(ctx.dtype)
    return grad, -message_grad if ctx.undo else message_grad, None, None


_exact_additive.register_autograd(_backward, setup_context=_setup)
