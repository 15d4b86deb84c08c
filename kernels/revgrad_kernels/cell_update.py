"""The update of an LSTM's cell state: `c' = sigmoid(f) c + sigmoid(i) tanh(g)`, one pass forward, one backward."""

from typing import Any

import torch
from torch import Tensor

from revgrad_kernels import recurrent_cpu
from revgrad_kernels.backend import (
    arithmetic_dtype,
    can_run,
    check_floats,
    converted,
    refuse_gradient,
    tl,
    tl_dtype,
    triton,
    uses_triton,
)
from revgrad_kernels.layout import gapless, tile, tuned
from revgrad_kernels.recurrent import (
    activated,
    aligned,
    bias_gradient,
    biased,
    check_gates,
    gate_gradients,
    given,
    launch,
    load_activated,
    recompute,
    side_by_side,
    split_gates,
    store_gate_gradients,
    updated,
)


def cell_update(gates: Tensor, cell: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """New cell state `sigmoid(f) * cell + sigmoid(i) * tanh(g)`.

    Args:
        gates: `[B, 3 C, ...]`, input gate, forget gate and candidate as a convolution returns them. The result has
            their memory layout.
        cell: `[B, C, ...]`, the previous cell state; its dtype is that of the result. Dtypes may be mixed; the
            arithmetic is in float32, or float64 where any input is.
        bias: `[3 C]`, optional, added to the gates.
        backend: `auto`, `triton` or `reference`; see `revgrad_kernels.backend`.

    Raises:
        ValueError: The shapes do not fit, or a tensor holds no floats.
        BackendError: The backend cannot compute this.
    """
    check_floats("cell_update", gates=gates, cell=cell, bias=bias)
    check_gates("cell_update", 3, cell, bias, gates=gates)
    if recurrent_cpu.takes(backend, gates, cell, bias):
        gates = biased(gates, bias, cell.dtype)
        small = cell.numel() < recurrent_cpu.SMALL
        return updated(cell, *gates.unsafe_chunk(3, 1)) if small else _OnCPU.compute(gates, cell)
    if uses_triton(backend, gates, cell, *given(bias), operator="cell_update"):
        return _cell_update(gates, cell, bias)
    return _reference(gates, cell, bias)


def _reference(gates: Tensor, cell: Tensor, bias: Tensor | None) -> Tensor:
    wide = arithmetic_dtype(gates, cell, bias)
    return converted(updated(converted(cell, wide), *split_gates(3, gates, bias, wide)), cell.dtype)


def _reference_backward(gates: Tensor, cell: Tensor, bias: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    wide = arithmetic_dtype(gates, cell, bias)
    i, f, g = activated(*split_gates(3, gates, bias, wide))
    grad = grad.to(wide)
    return side_by_side(gates, gate_gradients(grad, cell.to(wide), i, f, g)), (grad * f).to(cell.dtype)


class _OnCPU(recurrent_cpu.Operator):
    """Saves the old cell state and the gates after activation."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, cell: Tensor) -> Tensor:
        activated = recurrent_cpu.activate(*gates.chunk(3, 1))
        recurrent_cpu.save(ctx, cell, *activated)
        return recurrent_cpu.update(cell, *activated)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        saved = recurrent_cpu.saved(ctx)
        return recurrent_cpu.pull_back(*recurrent_cpu.room(saved[3], 3, grad), grad, *saved)


@triton.jit(do_not_specialize=["size"])
def _forward_kernel(
    gates_ptr, cell_ptr, bias_ptr, new_ptr, rows, columns, pixels, size,
    INDEX: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, column, mask = tile(rows, columns, TILE, WIDTH)
    offset = row * columns + column
    i, f, g = load_activated(gates_ptr, bias_ptr, row, column, columns, pixels, mask, 3, INDEX, WIDE)
    cell = tl.load(cell_ptr + offset, mask, other=0).to(WIDE)
    tl.store(new_ptr + offset, f * cell + i * g, mask)


@triton.jit(do_not_specialize=["size"])
def _backward_kernel(
    gates_ptr, cell_ptr, bias_ptr, grad_ptr, grad_gates_ptr, grad_cell_ptr, rows, columns, pixels, size,
    INDEX: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, column, mask = tile(rows, columns, TILE, WIDTH)
    offset = row * columns + column
    i, f, g = load_activated(gates_ptr, bias_ptr, row, column, columns, pixels, mask, 3, INDEX, WIDE)
    cell = tl.load(cell_ptr + offset, mask, other=0).to(WIDE)
    grad = tl.load(grad_ptr + offset, mask, other=0).to(WIDE)
    store_gate_gradients(grad_gates_ptr, grad, cell, i, f, g, row, column, columns, mask, 3)
    tl.store(grad_cell_ptr + offset, grad * f, mask)


_forward_tuned = tuned(_forward_kernel)
_backward_tuned = tuned(_backward_kernel)


@torch.library.custom_op("revgrad::cell_update", mutates_args=())
def _cell_update(gates: Tensor, cell: Tensor, bias: Tensor | None) -> Tensor:
    gates, cell = aligned(gates, cell)
    if not can_run(cell.device):
        return aligned(gates, _reference(gates, cell, bias))[1]
    new = torch.empty_like(cell)
    launch(_forward_tuned, 3, gates, cell, gapless(bias), new, wide=tl_dtype(gates, cell, bias))
    return new


@torch.library.custom_op("revgrad::cell_update_backward", mutates_args=())
def _cell_update_backward(gates: Tensor, cell: Tensor, bias: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    gates, cell, grad = aligned(gates, cell, grad)
    if not can_run(cell.device):
        return aligned(gates, *_reference_backward(gates, cell, bias, grad))[1:]
    grads = torch.empty_like(gates), torch.empty_like(cell)
    launch(_backward_tuned, 3, gates, cell, gapless(bias), grad, *grads, wide=tl_dtype(gates, cell, bias))
    return grads


@_cell_update.register_fake
def _(gates: Tensor, cell: Tensor, bias: Tensor | None) -> Tensor:
    gates, cell = aligned(gates, cell)
    return torch.empty_like(cell)


@_cell_update_backward.register_fake
def _(gates: Tensor, cell: Tensor, bias: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    gates, cell = aligned(gates, cell)
    return torch.empty_like(gates), torch.empty_like(cell)


def _gradients(gates: Tensor, cell: Tensor, bias: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_gates, grad_cell = _cell_update_backward(gates, cell, bias, grad)
    return grad_gates, grad_cell, bias_gradient(bias, grad_gates, arithmetic_dtype(gates, cell, bias))


recompute(_cell_update, _gradients)
refuse_gradient(_cell_update_backward)
