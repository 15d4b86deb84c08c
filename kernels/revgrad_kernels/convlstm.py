"""The pointwise half of CrevNet's ConvLSTM (appendix A: a peephole of the output gate), one pass forward, one backward:

c' = sigmoid(f) c + sigmoid(i) tanh(g)
h  = sigmoid(o + Wco c') tanh(c')
"""

import math
from itertools import chain
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
from revgrad_kernels.layout import gapless, is_channels_last, laid_out_like, tile, tuned
from revgrad_kernels.recurrent import (
    activated,
    aligned,
    bias_gradient,
    biased,
    check_gates,
    gate_gradients,
    gated,
    given,
    launch,
    load_activated,
    load_gate,
    recompute,
    side_by_side,
    sigmoid,
    sigmoid_backward,
    split_gates,
    store_gate,
    store_gate_gradients,
    tanh,
    tanh_backward,
    updated,
)


def convlstm(
    gates: Tensor, cell: Tensor, peephole: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """New hidden state and cell state of a ConvLSTM, from its convolution output.

    Args:
        gates: `[B, 4 C, ...]`, input gate, forget gate, candidate and output gate as a convolution returns them. The
            results have their memory layout.
        cell: `[B, C, ...]`, the previous cell state; its dtype is that of the results. Dtypes may be mixed; the
            arithmetic is in float32, or float64 where any input is.
        peephole: `[C, ...]`, the weight of each element of the new cell state in the output gate.
        bias: `[4 C]`, optional, added to the gates.
        backend: `auto`, `triton` or `reference`; see `revgrad_kernels.backend`.

    Raises:
        ValueError: The shapes do not fit, or a tensor holds no floats.
        BackendError: The backend cannot compute this.
    """
    check_floats("convlstm", gates=gates, cell=cell, peephole=peephole, bias=bias)
    check_gates("convlstm", 4, cell, bias, gates=gates)
    if peephole.shape != cell.shape[1:]:
        raise ValueError(f"convlstm: peephole {tuple(peephole.shape)} does not fit cell {tuple(cell.shape)}")
    if recurrent_cpu.takes(backend, gates, cell, peephole, bias):
        gates = biased(gates, bias, cell.dtype)
        small = cell.numel() < recurrent_cpu.SMALL
        return (_plain if small else _OnCPU.compute)(gates, cell, peephole)
    if uses_triton(backend, gates, cell, peephole, *given(bias), operator="convlstm"):
        return _convlstm(gates, cell, peephole, bias)
    return _reference(gates, cell, peephole, bias)


def _reference(gates: Tensor, cell: Tensor, peephole: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = arithmetic_dtype(gates, cell, peephole, bias)
    hidden, new = _plain(biased(gates, bias, wide), converted(cell, wide), converted(peephole, wide))
    return converted(hidden, cell.dtype), converted(new, cell.dtype)


def _plain(gates: Tensor, cell: Tensor, peephole: Tensor) -> tuple[Tensor, Tensor]:
    *before, o = gates.unsafe_chunk(4, 1)
    new = updated(cell, *before)
    return gated(o + peephole * new, new), new


def _reference_backward(
    gates: Tensor, cell: Tensor, peephole: Tensor, bias: Tensor | None, grad_hidden: Tensor, grad_new: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = arithmetic_dtype(gates, cell, peephole, bias)
    *gates_before, o = split_gates(4, gates, bias, wide)
    i, f, g = activated(*gates_before)
    before, peephole, grad_hidden = cell.to(wide), peephole.to(wide), grad_hidden.to(wide)
    new = f * before + i * g
    o, u = torch.sigmoid(torch.addcmul(o, peephole, new)), torch.tanh(new)
    grad_o = sigmoid_backward(grad_hidden * u, o)
    grad = torch.addcmul(grad_new + tanh_backward(grad_hidden * o, u), grad_o, peephole)
    grad_gates = side_by_side(gates, chain(gate_gradients(grad, before, i, f, g), (grad_o,)))
    return grad_gates, (grad * f).to(cell.dtype), grad_o * new


class _OnCPU(recurrent_cpu.Operator):
    """Saves both cell states, the peephole, and what has been activated."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, cell: Tensor, peephole: Tensor) -> tuple[Tensor, Tensor]:
        *before, o = gates.chunk(4, 1)
        activated = recurrent_cpu.activate(*before)
        new = recurrent_cpu.update(cell, *activated)
        o = torch.addcmul(o, peephole, new).sigmoid_()
        u = recurrent_cpu.tanh(new)
        recurrent_cpu.save(ctx, cell, *activated, peephole, new, o, u)
        return o * u, new

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor, grad_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        saved = recurrent_cpu.saved(ctx)
        peephole, new, o, u = saved[4:]
        whole, parts = recurrent_cpu.room(saved[3], 4, grad_hidden, grad_new)
        grad_o = recurrent_cpu.sigmoid_backward(grad_hidden * u, o, parts[3])
        grad = tanh_backward(grad_hidden * o, u)
        grad = grad + grad_new if whole is None else grad.add_(grad_new)
        grad = grad.addcmul_(grad_o, peephole)
        grad_gates, grad_cell = recurrent_cpu.pull_back(whole, parts, grad, *saved[:4], grad_o)
        return grad_gates, grad_cell, (grad_o * new).sum(0)


@triton.jit(do_not_specialize=["size"])
def _forward_kernel(
    gates_ptr, cell_ptr, peephole_ptr, bias_ptr, hidden_ptr, new_ptr, rows, columns, pixels, size, height,
    INDEX: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, column, mask = tile(rows, columns, TILE, WIDTH)
    offset = row * columns + column
    i, f, g = load_activated(gates_ptr, bias_ptr, row, column, columns, pixels, mask, 4, INDEX, WIDE)
    o = load_gate(gates_ptr, bias_ptr, row, column, columns, pixels, mask, 3, 4, INDEX, WIDE)
    cell = tl.load(cell_ptr + offset, mask, other=0).to(WIDE)
    peephole = tl.load(peephole_ptr + row % height * columns + column, mask, other=0).to(WIDE)
    new = f * cell + i * g
    tl.store(hidden_ptr + offset, sigmoid(o + peephole * new) * tanh(new), mask)
    tl.store(new_ptr + offset, new, mask)


@triton.jit(do_not_specialize=["size"])
def _backward_kernel(
    gates_ptr, cell_ptr, peephole_ptr, bias_ptr, grad_hidden_ptr, grad_new_ptr,
    grad_gates_ptr, grad_cell_ptr, grad_peephole_ptr, rows, columns, pixels, size, height,
    INDEX: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, column, mask = tile(rows, columns, TILE, WIDTH)
    offset = row * columns + column
    i, f, g = load_activated(gates_ptr, bias_ptr, row, column, columns, pixels, mask, 4, INDEX, WIDE)
    o = load_gate(gates_ptr, bias_ptr, row, column, columns, pixels, mask, 3, 4, INDEX, WIDE)
    cell = tl.load(cell_ptr + offset, mask, other=0).to(WIDE)
    peephole = tl.load(peephole_ptr + row % height * columns + column, mask, other=0).to(WIDE)
    grad_hidden = tl.load(grad_hidden_ptr + offset, mask, other=0).to(WIDE)
    grad_new = tl.load(grad_new_ptr + offset, mask, other=0).to(WIDE)
    new = f * cell + i * g
    o = sigmoid(o + peephole * new)
    u = tanh(new)
    grad_o = grad_hidden * u * o * (1 - o)
    grad = grad_new + grad_hidden * o * (1 - u * u) + grad_o * peephole
    store_gate_gradients(grad_gates_ptr, grad, cell, i, f, g, row, column, columns, mask, 4)
    store_gate(grad_gates_ptr, grad_o, row, column, columns, mask, 3, 4)
    tl.store(grad_cell_ptr + offset, grad * f, mask)
    tl.store(grad_peephole_ptr + offset, grad_o * new, mask)


_forward_tuned = tuned(_forward_kernel)
_backward_tuned = tuned(_backward_kernel)


def _height(gates: Tensor) -> int:
    """Rows of a sample, and so of the peephole."""
    return math.prod(gates.shape[2:]) if is_channels_last(gates) else 1


@torch.library.custom_op("revgrad::convlstm", mutates_args=())
def _convlstm(gates: Tensor, cell: Tensor, peephole: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    gates, cell = aligned(gates, cell)
    if not can_run(cell.device):
        return aligned(gates, *_reference(gates, cell, peephole, bias))[1:]
    hidden, new = torch.empty_like(cell), torch.empty_like(cell)
    peephole, wide = laid_out_like(gates, peephole[None]), tl_dtype(gates, cell, peephole, bias)
    launch(_forward_tuned, 4, gates, cell, peephole, gapless(bias), hidden, new, wide=wide, height=_height(gates))
    return hidden, new


@torch.library.custom_op("revgrad::convlstm_backward", mutates_args=())
def _convlstm_backward(
    gates: Tensor, cell: Tensor, peephole: Tensor, bias: Tensor | None, grad_hidden: Tensor, grad_new: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gates, cell, grad_hidden, grad_new = aligned(gates, cell, grad_hidden, grad_new)
    if not can_run(cell.device):
        return aligned(gates, *_reference_backward(gates, cell, peephole, bias, grad_hidden, grad_new))[1:]
    grad_peephole = torch.empty_like(cell, dtype=arithmetic_dtype(gates, cell, peephole, bias))
    grads = torch.empty_like(gates), torch.empty_like(cell), grad_peephole
    peephole, wide = laid_out_like(gates, peephole[None]), tl_dtype(gates, cell, peephole, bias)
    inputs = cell, peephole, gapless(bias), grad_hidden, grad_new
    launch(_backward_tuned, 4, gates, *inputs, *grads, wide=wide, height=_height(gates))
    return grads


@_convlstm.register_fake
def _(gates: Tensor, cell: Tensor, peephole: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    gates, cell = aligned(gates, cell)
    return torch.empty_like(cell), torch.empty_like(cell)


@_convlstm_backward.register_fake
def _(
    gates: Tensor, cell: Tensor, peephole: Tensor, bias: Tensor | None, grad_hidden: Tensor, grad_new: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gates, cell = aligned(gates, cell)
    grad_peephole = torch.empty_like(cell, dtype=arithmetic_dtype(gates, cell, peephole, bias))
    return torch.empty_like(gates), torch.empty_like(cell), grad_peephole


def _gradients(
    gates: Tensor, cell: Tensor, peephole: Tensor, bias: Tensor | None, *grads: Tensor
) -> tuple[Tensor | None, ...]:
    # The gradient of the peephole comes out per sample: tiles of one element lie in different programs.
    grad_gates, grad_cell, grad_peephole = _convlstm_backward(gates, cell, peephole, bias, *grads)
    grad_bias = bias_gradient(bias, grad_gates, arithmetic_dtype(gates, cell, peephole, bias))
    return grad_gates, grad_cell, grad_peephole.sum(0).to(peephole.dtype), grad_bias


recompute(_convlstm, _gradients)
refuse_gradient(_convlstm_backward)
