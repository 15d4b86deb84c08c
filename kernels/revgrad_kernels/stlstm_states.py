"""The pointwise half of CrevNet's ST-LSTM (appendix A) before its output convolutions, one pass forward, one backward:

    c' = sigmoid(f) c + sigmoid(i) tanh(g)
    m' = sigmoid(f') m + sigmoid(i') tanh(g')

The output convolutions read `[c', m']`, and their result is added to the output gate; the other half is
`revgrad_kernels.hidden_output`.
"""

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
from revgrad_kernels.layout import gapless, memory_format, tile, tuned
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
    load_gate,
    recompute,
    side_by_side,
    split_gates,
    store_gate,
    store_gate_gradients,
    updated,
)

_Four = tuple[Tensor, Tensor, Tensor, Tensor]


def stlstm_states(
    gates: Tensor,
    memory_gates: Tensor,
    cell: Tensor,
    memory: Tensor,
    bias: Tensor | None = None,
    memory_bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> _Four:
    """New cell state and memory of an ST-LSTM, from its convolution outputs.

    Args:
        gates: `[B, 4 C, ...]`, input gate, forget gate, candidate and output gate as a convolution returns them. The
            results have their memory layout.
        memory_gates: `[B, 3 C, ...]`, input gate, forget gate and candidate of the memory.
        cell: `[B, C, ...]`, the previous cell state. Dtypes may be mixed; the arithmetic is in float32, or float64
            where any input is.
        memory: `[B, C, ...]`, the previous memory.
        bias: `[4 C]`, optional, added to the gates.
        memory_bias: `[3 C]`, optional, added to the memory's gates.
        backend: `auto`, `triton` or `reference`; see `revgrad_kernels.backend`.

    Returns:
        The cell state and the memory, in their dtypes; both in one tensor `[B, 2 C, ...]`, in the wider of the two; and
        the output gate before activation, `[B, C, ...]` in the dtype of the cell state, the bias added.

    Raises:
        ValueError: The shapes do not fit, or a tensor holds no floats.
        BackendError: The backend cannot compute this.
    """
    check_floats("stlstm_states", gates=gates, memory_gates=memory_gates, cell=cell, memory=memory)
    check_floats("stlstm_states", bias=bias, memory_bias=memory_bias)
    check_gates("stlstm_states", 4, cell, bias, gates=gates)
    check_gates("stlstm_states", 3, cell, memory_bias, memory_gates=memory_gates)
    if memory.shape != cell.shape:
        raise ValueError(f"stlstm_states: memory {tuple(memory.shape)} does not fit cell {tuple(cell.shape)}")
    if recurrent_cpu.takes(backend, gates, memory_gates, cell, memory, bias, memory_bias):
        gates, memory_gates = biased(gates, bias, cell.dtype), biased(memory_gates, memory_bias, cell.dtype)
        small = cell.numel() < recurrent_cpu.SMALL
        return (_plain if small else _OnCPU.compute)(gates, memory_gates, cell, memory)
    if uses_triton(backend, gates, memory_gates, cell, memory, *given(bias, memory_bias), operator="stlstm_states"):
        return _stlstm_states(gates, memory_gates, cell, memory, bias, memory_bias)
    return _reference(gates, memory_gates, cell, memory, bias, memory_bias)


def _reference(
    gates: Tensor, memory_gates: Tensor, cell: Tensor, memory: Tensor, bias: Tensor | None, memory_bias: Tensor | None
) -> _Four:
    wide = arithmetic_dtype(gates, memory_gates, cell, memory, bias, memory_bias)
    new_cell, new_memory, both, o = _plain(
        biased(gates, bias, wide),
        biased(memory_gates, memory_bias, wide),
        converted(cell, wide),
        converted(memory, wide),
    )
    both = converted(both, _both_dtype(cell, memory))
    return converted(new_cell, cell.dtype), converted(new_memory, memory.dtype), both, converted(o, cell.dtype)


def _plain(gates: Tensor, memory_gates: Tensor, cell: Tensor, memory: Tensor) -> _Four:
    *before, o = gates.unsafe_chunk(4, 1)
    new_cell, new_memory = updated(cell, *before), updated(memory, *memory_gates.unsafe_chunk(3, 1))
    return new_cell, new_memory, torch.cat([new_cell, new_memory], 1), o.clone()  # the gates are the caller's


def _reference_backward(
    gates: Tensor,
    memory_gates: Tensor,
    cell: Tensor,
    memory: Tensor,
    bias: Tensor | None,
    memory_bias: Tensor | None,
    *grads: Tensor,
) -> _Four:
    wide = arithmetic_dtype(gates, memory_gates, cell, memory, bias, memory_bias)
    grad_new_cell, grad_new_memory, grad_both, grad_o = grads
    of_cell, of_memory = grad_both.to(wide).split([cell.shape[1]] * 2, dim=1)

    i, f, g = activated(*split_gates(4, gates, bias, wide)[:3])
    grad = grad_new_cell + of_cell
    grad_gates = side_by_side(gates, chain(gate_gradients(grad, cell.to(wide), i, f, g), (grad_o,)))
    grad_cell = (grad * f).to(cell.dtype)

    i, f, g = activated(*split_gates(3, memory_gates, memory_bias, wide))
    grad = grad_new_memory + of_memory
    grad_memory_gates = side_by_side(memory_gates, gate_gradients(grad, memory.to(wide), i, f, g))
    return grad_gates, grad_memory_gates, grad_cell, (grad * f).to(memory.dtype)


class _OnCPU(recurrent_cpu.Operator):
    """Saves the old states, and the gates but the output gate after activation."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, memory_gates: Tensor, cell: Tensor, memory: Tensor) -> _Four:
        *before, o = gates.chunk(4, 1)
        of_cell, of_memory = recurrent_cpu.activate(*before), recurrent_cpu.activate(*memory_gates.chunk(3, 1))
        recurrent_cpu.save(ctx, cell, *of_cell, memory, *of_memory)
        new_cell, new_memory = recurrent_cpu.update(cell, *of_cell), recurrent_cpu.update(memory, *of_memory)
        return new_cell, new_memory, torch.cat([new_cell, new_memory], 1), o.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> _Four:
        saved = recurrent_cpu.saved(ctx)
        of_cell, of_memory = grads[2].chunk(2, 1)
        whole, parts = recurrent_cpu.room(saved[3], 4, *grads)
        grad_o = recurrent_cpu.put(parts[3], grads[3])
        grad_gates, grad_cell = recurrent_cpu.pull_back(whole, parts, grads[0] + of_cell, *saved[:4], grad_o)
        whole, parts = recurrent_cpu.room(saved[7], 3, *grads)
        grad_memory_gates, grad_memory = recurrent_cpu.pull_back(whole, parts, grads[1] + of_memory, *saved[4:])
        return grad_gates, grad_memory_gates, grad_cell, grad_memory


@triton.jit(do_not_specialize=["size"])
def _forward_kernel(
    gates_ptr, memory_gates_ptr, cell_ptr, memory_ptr, bias_ptr, memory_bias_ptr,
    new_cell_ptr, new_memory_ptr, both_ptr, o_ptr, rows, columns, pixels, size,
    INDEX: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, column, mask = tile(rows, columns, TILE, WIDTH)
    offset = row * columns + column
    i, f, g = load_activated(gates_ptr, bias_ptr, row, column, columns, pixels, mask, 4, INDEX, WIDE)
    cell = f * tl.load(cell_ptr + offset, mask, other=0).to(WIDE) + i * g
    tl.store(new_cell_ptr + offset, cell, mask)
    store_gate(both_ptr, cell, row, column, columns, mask, 0, 2)
    i, f, g = load_activated(memory_gates_ptr, memory_bias_ptr, row, column, columns, pixels, mask, 3, INDEX, WIDE)
    memory = f * tl.load(memory_ptr + offset, mask, other=0).to(WIDE) + i * g
    tl.store(new_memory_ptr + offset, memory, mask)
    store_gate(both_ptr, memory, row, column, columns, mask, 1, 2)
    o = load_gate(gates_ptr, bias_ptr, row, column, columns, pixels, mask, 3, 4, INDEX, WIDE)
    tl.store(o_ptr + offset, o, mask)


@triton.jit(do_not_specialize=["size"])
def _backward_kernel(
    gates_ptr, memory_gates_ptr, cell_ptr, memory_ptr, bias_ptr, memory_bias_ptr,
    grad_new_cell_ptr, grad_new_memory_ptr, grad_both_ptr, grad_o_ptr,
    grad_gates_ptr, grad_memory_gates_ptr, grad_cell_ptr, grad_memory_ptr, rows, columns, pixels, size,
    INDEX: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, column, mask = tile(rows, columns, TILE, WIDTH)
    offset = row * columns + column
    i, f, g = load_activated(gates_ptr, bias_ptr, row, column, columns, pixels, mask, 4, INDEX, WIDE)
    cell = tl.load(cell_ptr + offset, mask, other=0).to(WIDE)
    grad = tl.load(grad_new_cell_ptr + offset, mask, other=0).to(WIDE)
    grad += load_gate(grad_both_ptr, None, row, column, columns, pixels, mask, 0, 2, INDEX, WIDE)
    store_gate_gradients(grad_gates_ptr, grad, cell, i, f, g, row, column, columns, mask, 4)
    store_gate(grad_gates_ptr, tl.load(grad_o_ptr + offset, mask), row, column, columns, mask, 3, 4)
    tl.store(grad_cell_ptr + offset, grad * f, mask)
    i, f, g = load_activated(memory_gates_ptr, memory_bias_ptr, row, column, columns, pixels, mask, 3, INDEX, WIDE)
    memory = tl.load(memory_ptr + offset, mask, other=0).to(WIDE)
    grad = tl.load(grad_new_memory_ptr + offset, mask, other=0).to(WIDE)
    grad += load_gate(grad_both_ptr, None, row, column, columns, pixels, mask, 1, 2, INDEX, WIDE)
    store_gate_gradients(grad_memory_gates_ptr, grad, memory, i, f, g, row, column, columns, mask, 3)
    tl.store(grad_memory_ptr + offset, grad * f, mask)


_forward_tuned = tuned(_forward_kernel)
_backward_tuned = tuned(_backward_kernel)


@torch.library.custom_op("revgrad::stlstm_states", mutates_args=())
def _stlstm_states(
    gates: Tensor, memory_gates: Tensor, cell: Tensor, memory: Tensor, bias: Tensor | None, memory_bias: Tensor | None
) -> _Four:
    gates, memory_gates, cell, memory = aligned(gates, memory_gates, cell, memory)
    biases = gapless(bias), gapless(memory_bias)
    if not can_run(cell.device):
        return aligned(gates, *_reference(gates, memory_gates, cell, memory, *biases))[1:]
    results = _empty_results(gates, cell, memory)
    wide = tl_dtype(gates, memory_gates, cell, memory, *biases)
    launch(_forward_tuned, 4, gates, memory_gates, cell, memory, *biases, *results, wide=wide)
    return results


@torch.library.custom_op("revgrad::stlstm_states_backward", mutates_args=())
def _stlstm_states_backward(
    gates: Tensor,
    memory_gates: Tensor,
    cell: Tensor,
    memory: Tensor,
    bias: Tensor | None,
    memory_bias: Tensor | None,
    grad_new_cell: Tensor,
    grad_new_memory: Tensor,
    grad_both: Tensor,
    grad_o: Tensor,
) -> _Four:
    gates, memory_gates, cell, memory = aligned(gates, memory_gates, cell, memory)
    biases = gapless(bias), gapless(memory_bias)
    grads = aligned(gates, grad_new_cell, grad_new_memory, grad_both, grad_o)[1:]
    if not can_run(cell.device):
        return aligned(gates, *_reference_backward(gates, memory_gates, cell, memory, *biases, *grads))[1:]
    results = _empty_gradients(gates, memory_gates, cell, memory)
    wide = tl_dtype(gates, memory_gates, cell, memory, *biases)
    launch(_backward_tuned, 4, gates, memory_gates, cell, memory, *biases, *grads, *results, wide=wide)
    return results


@_stlstm_states.register_fake
def _(
    gates: Tensor, memory_gates: Tensor, cell: Tensor, memory: Tensor, bias: Tensor | None, memory_bias: Tensor | None
) -> _Four:
    return _empty_results(*aligned(gates, cell, memory))


@_stlstm_states_backward.register_fake
def _(gates: Tensor, memory_gates: Tensor, cell: Tensor, memory: Tensor, *_: Any) -> _Four:
    return _empty_gradients(*aligned(gates, memory_gates, cell, memory))


def _both_dtype(cell: Tensor, memory: Tensor) -> torch.dtype:
    return torch.promote_types(cell.dtype, memory.dtype)


def _empty_results(gates: Tensor, cell: Tensor, memory: Tensor) -> _Four:
    # By the gates: one channel alone is contiguous and channels-last at once, and kernels take the layout of the gates.
    shape = (cell.shape[0], 2 * cell.shape[1], *cell.shape[2:])
    dtype, layout = _both_dtype(cell, memory), memory_format(gates)
    both = torch.empty(shape, dtype=dtype, device=cell.device, memory_format=layout)
    return torch.empty_like(cell), torch.empty_like(memory), both, torch.empty_like(cell)


def _empty_gradients(gates: Tensor, memory_gates: Tensor, cell: Tensor, memory: Tensor) -> _Four:
    return torch.empty_like(gates), torch.empty_like(memory_gates), torch.empty_like(cell), torch.empty_like(memory)


def _gradients(
    gates: Tensor,
    memory_gates: Tensor,
    cell: Tensor,
    memory: Tensor,
    bias: Tensor | None,
    memory_bias: Tensor | None,
    *grads: Tensor,
) -> tuple[Tensor | None, ...]:
    inputs = gates, memory_gates, cell, memory
    wide = arithmetic_dtype(*inputs, bias, memory_bias)
    results = _stlstm_states_backward(*inputs, bias, memory_bias, *grads)
    return *results, bias_gradient(bias, results[0], wide), bias_gradient(memory_bias, results[1], wide)


recompute(_stlstm_states, _gradients)
refuse_gradient(_stlstm_states_backward)
