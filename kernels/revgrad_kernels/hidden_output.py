"""The hidden state of an LSTM: `h = sigmoid(o) tanh(u)`, one pass forward, one backward."""

from typing import Any

import torch
from torch import Tensor

from revgrad_kernels import recurrent_cpu
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
from revgrad_kernels.layout import canonical, elements, laid_out_like, size_class, tile, tuned
from revgrad_kernels.recurrent import gated, given, recompute, sigmoid, sigmoid_backward, tanh, tanh_backward


def hidden_output(output_gate: Tensor, update: Tensor, added: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """New hidden state `sigmoid(output_gate + added) * tanh(update)`.

    Args:
        output_gate: Before activation, of any shape.
        update: Before activation, of that shape; the result has its memory layout, and the wider dtype of the two. The
            arithmetic is in float32, or float64 where any input is.
        added: Second summand of the output gate, of that shape; optional.
        backend: `auto`, `triton` or `reference`; see `revgrad_kernels.backend`.

    Raises:
        ValueError: The shapes differ, or a tensor holds no floats.
        BackendError: The backend cannot compute this.
    """
    check_floats("hidden_output", output_gate=output_gate, update=update, added=added)
    tensors = (output_gate, update) if added is None else (output_gate, update, added)
    shape = update.shape
    if output_gate.shape != shape or (added is not None and added.shape != shape):
        raise ValueError(f"hidden_output: shapes {', '.join(str(tuple(t.shape)) for t in tensors)} differ")
    if recurrent_cpu.takes(backend, *tensors):
        if update.numel() < recurrent_cpu.SMALL:
            return gated(output_gate if added is None else output_gate + added, update)
        return _OnCPU.compute(*tensors)
    if uses_triton(backend, *tensors, operator="hidden_output"):
        return _hidden_output(output_gate, update, added)
    return converted(_reference(_summed(output_gate, update, added), update), _dtype(output_gate, update))


def _reference(gate: Tensor, update: Tensor) -> Tensor:
    wide = arithmetic_dtype(gate, update)
    return gated(converted(gate, wide), converted(update, wide))


def _reference_backward(gate: Tensor, update: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    wide = arithmetic_dtype(gate, update)
    o, u, grad = torch.sigmoid(gate.to(wide)), torch.tanh(update.to(wide)), grad.to(wide)
    return sigmoid_backward(grad * u, o).to(gate.dtype), tanh_backward(grad * o, u).to(update.dtype)


class _OnCPU(recurrent_cpu.Operator):
    """Saves what has been activated."""

    @staticmethod
    def forward(ctx: Any, output_gate: Tensor, update: Tensor, *added: Tensor) -> Tensor:
        o = torch.add(output_gate, *added).sigmoid_() if added else torch.sigmoid(output_gate)
        u = recurrent_cpu.tanh(update)
        recurrent_cpu.save(ctx, o, u)
        return u * o  # in the layout of the update

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        o, u = recurrent_cpu.saved(ctx)
        grad_o, grad_u = sigmoid_backward(grad * u, o), tanh_backward(grad * o, u)
        return (grad_o, grad_u, grad_o)[: len(ctx.needs_input_grad)]


@triton.jit(do_not_specialize=["size"])
def _forward_kernel(
    output_gate_ptr, update_ptr, added_ptr, hidden_ptr, rows, columns, size,
    WIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, column, mask = tile(rows, columns, TILE, WIDTH)
    offset = row * columns + column
    o, u = _load(output_gate_ptr, update_ptr, added_ptr, offset, mask, WIDE)
    tl.store(hidden_ptr + offset, o * u, mask)


@triton.jit(do_not_specialize=["size"])
def _backward_kernel(
    output_gate_ptr, update_ptr, added_ptr, grad_ptr, grad_gate_ptr, grad_update_ptr, rows, columns, size,
    WIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, column, mask = tile(rows, columns, TILE, WIDTH)
    offset = row * columns + column
    o, u = _load(output_gate_ptr, update_ptr, added_ptr, offset, mask, WIDE)
    grad = tl.load(grad_ptr + offset, mask, other=0).to(WIDE)
    tl.store(grad_gate_ptr + offset, grad * u * o * (1 - o), mask)
    tl.store(grad_update_ptr + offset, grad * o * (1 - u * u), mask)


@triton.jit
def _load(output_gate_ptr, update_ptr, added_ptr, offset, mask, WIDE: tl.constexpr):
    gate = tl.load(output_gate_ptr + offset, mask, other=0).to(WIDE)
    if added_ptr is not None:
        gate += tl.load(added_ptr + offset, mask, other=0).to(WIDE)
    return sigmoid(gate), tanh(tl.load(update_ptr + offset, mask, other=0).to(WIDE))


_forward_tuned = tuned(_forward_kernel)
_backward_tuned = tuned(_backward_kernel)


def _launch(kernel: Any, output_gate: Tensor, update: Tensor, added: Tensor | None, *tensors: Tensor) -> None:
    if update.numel():
        matrix = elements(update)
        with on_device(update):
            kernel[matrix.grid](
                output_gate, update, added, *tensors, matrix.rows, matrix.columns, size_class(update.numel()),
                WIDE=tl_dtype(*given(output_gate, update, added)), WIDTH=matrix.width,
            )  # fmt: skip


@torch.library.custom_op("revgrad::hidden_output", mutates_args=())
def _hidden_output(output_gate: Tensor, update: Tensor, added: Tensor | None) -> Tensor:
    update, output_gate, added = _aligned(update, output_gate, added)
    if not can_run(update.device):
        hidden = _reference(_summed(output_gate, update, added), update)
        return laid_out_like(update, hidden.to(_dtype(output_gate, update)))
    hidden = torch.empty_like(update, dtype=_dtype(output_gate, update))
    _launch(_forward_tuned, output_gate, update, added, hidden)
    return hidden


@torch.library.custom_op("revgrad::hidden_output_backward", mutates_args=())
def _hidden_output_backward(
    output_gate: Tensor, update: Tensor, added: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor]:
    update, output_gate, added = _aligned(update, output_gate, added)
    grad = laid_out_like(update, grad)
    if not can_run(update.device):
        grad_gate, grad_update = _reference_backward(_summed(output_gate, update, added), update, grad)
        grad_gate = grad_gate.to(_gate_dtype(output_gate, added))
        return laid_out_like(update, grad_gate), laid_out_like(update, grad_update)
    grads = torch.empty_like(update, dtype=_gate_dtype(output_gate, added)), torch.empty_like(update)
    _launch(_backward_tuned, output_gate, update, added, grad, *grads)
    return grads


@_hidden_output.register_fake
def _(output_gate: Tensor, update: Tensor, added: Tensor | None) -> Tensor:
    return torch.empty_like(canonical(update), dtype=_dtype(output_gate, update))


@_hidden_output_backward.register_fake
def _(output_gate: Tensor, update: Tensor, added: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    update = canonical(update)
    return torch.empty_like(update, dtype=_gate_dtype(output_gate, added)), torch.empty_like(update)


def _gradients(output_gate: Tensor, update: Tensor, added: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
    # One gradient for both summands, unless their dtypes differ.
    grad_gate, grad_update = _hidden_output_backward(output_gate, update, added, grad)
    return grad_gate.to(output_gate.dtype), grad_update, None if added is None else grad_gate.to(added.dtype)


recompute(_hidden_output, _gradients)
refuse_gradient(_hidden_output_backward)


def _summed(output_gate: Tensor, update: Tensor, added: Tensor | None) -> Tensor:
    if added is None:
        return output_gate
    wide = arithmetic_dtype(output_gate, update, added)
    return converted(output_gate, wide) + converted(added, wide)


def _dtype(output_gate: Tensor, update: Tensor) -> torch.dtype:
    return torch.promote_types(output_gate.dtype, update.dtype)


def _gate_dtype(output_gate: Tensor, added: Tensor | None) -> torch.dtype:
    return output_gate.dtype if added is None else torch.promote_types(output_gate.dtype, added.dtype)


def _aligned(update: Tensor, output_gate: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    update = canonical(update)
    return update, laid_out_like(update, output_gate), None if added is None else laid_out_like(update, added)
