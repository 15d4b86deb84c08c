"""The pointwise halves of ConvLSTM and ST-LSTM (appendix A), from convolution outputs to new states.

Both operators save only their inputs and recompute the activations in backward: what autograd would keep (three
sigmoids, two hyperbolic tangents and their products) is larger than the inputs themselves.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _CellUpdate(torch.autograd.Function):
    """`c' = sigmoid(f) c + sigmoid(i) tanh(g)`; saves `gates [B, 3 C, ...]` (in the order i, f, g) and `c`."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, cell: Tensor) -> Tensor:
        ctx.save_for_backward(gates, cell)
        i, f, g = gates.chunk(3, dim=1)
        return torch.addcmul(torch.sigmoid(f).mul_(cell), torch.sigmoid(i), torch.tanh(g))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gates, cell = ctx.saved_tensors
        i, f, g = gates.chunk(3, dim=1)
        i, f, g = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g)
        grad_gates = torch.empty_like(gates)
        grad_i, grad_f, grad_g = grad_gates.chunk(3, dim=1)
        torch.mul(grad, g, out=grad_i).mul_(i).mul_(1 - i)
        torch.mul(grad, cell, out=grad_f).mul_(f).mul_(1 - f)
        torch.mul(grad, i, out=grad_g).mul_(1 - g.square())
        return grad_gates, grad * f


class _HiddenOutput(torch.autograd.Function):
    """`h = sigmoid(o) tanh(u)`; saves `o` and `u`."""

    @staticmethod
    def forward(ctx: Any, output_gate: Tensor, update: Tensor) -> Tensor:
        ctx.save_for_backward(output_gate, update)
        return torch.sigmoid(output_gate).mul_(torch.tanh(update))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        output_gate, update = ctx.saved_tensors
        o, u = torch.sigmoid(output_gate), torch.tanh(update)
        grad_o = (grad * u).mul_(o).mul_(1 - o)
        return grad_o, (grad * o).mul_(1 - u.square())


def cell_update(gates: Tensor, cell: Tensor) -> Tensor:
    """New cell state `sigmoid(f) * cell + sigmoid(i) * tanh(g)`.

    Args:
        gates: `[B, 3 C, ...]`, the convolution outputs of the input gate, forget gate and candidate, before activation.
        cell: `[B, C, ...]`, the previous cell state.

    Raises:
        ValueError: The shapes do not fit.
    """
    if gates.shape[1] != 3 * cell.shape[1] or gates.shape[2:] != cell.shape[2:] or gates.shape[0] != cell.shape[0]:
        raise ValueError(
            f"cell_update: gates {tuple(gates.shape)} must have three times the channels of cell {tuple(cell.shape)}"
        )
    return _CellUpdate.apply(gates.to(cell.dtype), cell)


def hidden_output(output_gate: Tensor, update: Tensor) -> Tensor:
    """New hidden state `sigmoid(output_gate) * tanh(update)`, both before activation and of one shape."""
    if output_gate.shape != update.shape:
        raise ValueError(f"hidden_output: shapes {tuple(output_gate.shape)} and {tuple(update.shape)} differ")
    dtype = torch.promote_types(output_gate.dtype, update.dtype)
    return _HiddenOutput.apply(output_gate.to(dtype), update.to(dtype))
