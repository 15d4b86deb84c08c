"""The operators of `revgrad_kernels`, each with inputs of any size and the plain PyTorch whose place it takes.

One list for everybody who goes through all operators: the compile report, their speed, CUDA graphs, compilation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from revgrad_kernels import (
    cell_update,
    convlstm,
    exact_additive,
    exact_additive_inverse,
    exact_weighted_sum,
    exact_weighted_sum_inverse,
    exact_weighted_sum_refill,
    hidden_output,
    level_costs,
    pixel_shuffle,
    pixel_shuffle_concatenate,
    pixel_unshuffle,
    pixel_unshuffle_split,
    stlstm_states,
    weighted_sum,
    weighted_sum_inverse,
)
from torch import Tensor

STREAM = (32, 3, 8, 8)
"""Channels, frames, height and width of a stream of the paper's CrevNet, and of a recurrent state; one sequence."""
ELEMENTS = math.prod(STREAM)
FACTOR = 2
SPEEDUP = 3
_GRID = 2.0**16
_SPILLS = 0.06
"""Share of the elements that spill at a gate of one half: one bit of sixteen."""


@dataclass(frozen=True)
class Inputs:
    """Random tensors of the shapes that CrevNet has, for a batch."""

    batch: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    channels_last: bool = False

    def feature(self, groups: int = 1) -> Tensor:
        """A stream, or several side by side in their channels."""
        return self._normal(groups * STREAM[0], *STREAM[1:])

    def folded(self) -> Tensor:
        """A stream."""
        return self.feature()

    def unfolded(self) -> Tensor:
        """What folds into a stream."""
        channels, frames, height, width = STREAM
        return self._normal(channels // FACTOR**2, frames, height * FACTOR, width * FACTOR)

    def half(self) -> Tensor:
        """Half of the channels of a stream."""
        return self._normal(STREAM[0] // 2, *STREAM[1:])

    def bias(self, groups: int = 1) -> Tensor:
        """One number per channel, in float32 as the parameters of a model are under autocast."""
        return torch.randn(groups * STREAM[0], device=self.device)

    def peephole(self) -> Tensor:
        """One number per element of a recurrent state, in float32 as `bias`."""
        return torch.randn(STREAM, device=self.device)

    def grid(self) -> Tensor:
        """A stream of exact arithmetic: float32 on the grid, whatever the dtype of the messages."""
        return torch.round(replace(self, dtype=torch.float32).feature() * _GRID) / _GRID

    def reservoir(self) -> Tensor:
        """What gates have forgotten before."""
        return torch.randint(2**30, (self.batch * ELEMENTS,), device=self.device)

    def level(self) -> Tensor:
        """How full the reservoirs are."""
        return torch.randint(2**12, (self.batch * ELEMENTS,), dtype=torch.int16, device=self.device)

    def costs(self) -> Tensor:
        """The table of what a gate costs; the caller's own, as the kernels' is shared."""
        return level_costs(torch.device(self.device)).clone()

    def word(self) -> Tensor:
        """What reservoirs have spilled."""
        return torch.randint(-(2**15), 2**15, (self.batch * ELEMENTS,), dtype=torch.int16, device=self.device)

    def refill(self) -> Tensor:
        """Which of it is to be put back."""
        return torch.rand(self.batch * ELEMENTS, device=self.device) < _SPILLS

    def _normal(self, *shape: int) -> Tensor:
        x = torch.randn(self.batch, *shape, dtype=self.dtype, device=self.device)
        return x.contiguous(memory_format=torch.channels_last_3d) if self.channels_last else x


@dataclass(frozen=True)
class Operator:
    """An operator and its counterpart, functions of the same tensors."""

    name: str
    fused: Callable[..., Any]
    """Takes `backend` as well."""
    plain: Callable[..., Any]
    """As one would write it in PyTorch."""
    inputs: Callable[[Inputs], tuple[Tensor, ...]]
    speedup: bool = False
    """Whether it shall be `SPEEDUP` times as fast as `plain`."""
    differentiable: bool = True

    def leaves(self, made: Inputs) -> tuple[Tensor, ...]:
        """Inputs, of which those that can have gradients want them."""
        tensors = self.inputs(made)
        if self.differentiable:
            for t in tensors:
                t.requires_grad_(t.is_floating_point())
        return tensors


def outputs(result: Any) -> tuple[Tensor, ...]:
    """The results of a call as a tuple."""
    return tuple(result) if isinstance(result, Sequence) else (result,)


def with_gradients(results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Those that gradients come through."""
    return tuple(t for t in results if t.requires_grad)


def backward(results: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the leaves that want one, as often as one likes."""
    return torch.autograd.grad(with_gradients(results), with_gradients(leaves), grads, retain_graph=True)


def _blend(logits: Tensor, x: Tensor, h: Tensor, bias: Tensor | None = None) -> Tensor:
    gate = torch.sigmoid(_biased(logits, bias))
    return ((1 - gate) * x + gate * h).to(x.dtype)


def _unblend(logits: Tensor, y: Tensor, h: Tensor) -> Tensor:
    gate = torch.sigmoid(logits)
    return (y - gate * h) / (1 - gate)


def _fold(x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    n = FACTOR
    blocks = x.view(b, c, t, h // n, n, w // n, n).permute(0, 1, 4, 6, 2, 3, 5)
    return blocks.reshape(b, c * n**2, t, h // n, w // n)


def _unfold(y: Tensor) -> Tensor:
    b, c, t, h, w = y.shape
    n = FACTOR
    blocks = y.view(b, c // n**2, n, n, t, h, w).permute(0, 1, 4, 5, 2, 6, 3)
    return blocks.reshape(b, c // n**2, t, h * n, w * n)


def _fold_split(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(half.contiguous() for half in _fold(x).chunk(2, 1))


def _concatenate_unfold(first: Tensor, second: Tensor) -> Tensor:
    return _unfold(torch.cat((first, second), 1))


def _cell(gates: Tensor, cell: Tensor, bias: Tensor | None = None) -> Tensor:
    i, f, g = _biased(gates, bias).chunk(3, 1)
    return (torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)).to(cell.dtype)


def _hidden(output_gate: Tensor, update: Tensor) -> Tensor:
    return torch.sigmoid(output_gate) * torch.tanh(update)


def _convlstm(gates: Tensor, cell: Tensor, peephole: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = _biased(gates, bias).chunk(4, 1)
    new = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    hidden = torch.sigmoid(o + peephole * new) * torch.tanh(new)
    return hidden.to(cell.dtype), new.to(cell.dtype)


def _stlstm(
    gates: Tensor, memory_gates: Tensor, cell: Tensor, memory: Tensor, bias: Tensor, memory_bias: Tensor
) -> tuple[Tensor, ...]:
    i, f, g, o = _biased(gates, bias).chunk(4, 1)
    new_cell = (torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)).to(cell.dtype)
    new_memory = _cell(memory_gates, memory, memory_bias)
    return new_cell, new_memory, torch.cat((new_cell, new_memory), 1), o.to(cell.dtype)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.view(-1, *(1,) * (x.ndim - 2))


def _reference(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Exact arithmetic has no simpler form than the operator's own in plain PyTorch."""
    return partial(operator, backend="reference")


OPERATORS = (
    Operator("weighted_sum", weighted_sum, _blend, lambda i: (i.feature(), i.feature(), i.feature()), speedup=True),
    Operator(
        "weighted_sum, bias",
        weighted_sum,
        _blend,
        lambda i: (i.feature(), i.feature(), i.feature(), i.bias()),
        speedup=True,
    ),
    Operator(
        "weighted_sum_inverse",
        weighted_sum_inverse,
        _unblend,
        lambda i: (i.feature(), i.feature(), i.feature()),
        speedup=True,
        differentiable=False,
    ),
    Operator("cell_update", cell_update, _cell, lambda i: (i.feature(3), i.feature()), speedup=True),
    Operator("cell_update, bias", cell_update, _cell, lambda i: (i.feature(3), i.feature(), i.bias(3)), speedup=True),
    Operator("hidden_output", hidden_output, _hidden, lambda i: (i.feature(), i.feature()), speedup=True),
    Operator(
        "convlstm",
        convlstm,
        _convlstm,
        lambda i: (i.feature(4), i.feature(), i.peephole(), i.bias(4)),
        speedup=True,
    ),
    Operator(
        "stlstm_states",
        stlstm_states,
        _stlstm,
        lambda i: (i.feature(4), i.feature(3), i.feature(), i.feature(), i.bias(4), i.bias(3)),
        speedup=True,
    ),
    Operator(
        "exact_additive",
        exact_additive,
        _reference(exact_additive),
        lambda i: (i.grid(), i.feature()),
    ),
    Operator(
        "exact_additive_inverse",
        exact_additive_inverse,
        _reference(exact_additive_inverse),
        lambda i: (i.grid(), i.feature()),
        differentiable=False,
    ),
    Operator(
        "exact_weighted_sum",
        exact_weighted_sum,
        _reference(exact_weighted_sum),
        lambda i: (i.feature(), i.grid(), i.feature(), i.reservoir(), i.level(), i.costs()),
    ),
    Operator(
        "exact_weighted_sum_refill",
        exact_weighted_sum_refill,
        _reference(exact_weighted_sum_refill),
        lambda i: (i.feature(), i.grid(), i.level(), i.costs()),
        differentiable=False,
    ),
    Operator(
        "exact_weighted_sum_inverse",
        exact_weighted_sum_inverse,
        _reference(exact_weighted_sum_inverse),
        lambda i: (i.feature(), i.grid(), i.feature(), i.reservoir(), i.word(), i.refill()),
        differentiable=False,
    ),
    Operator(
        "pixel_unshuffle",
        lambda x, **how: pixel_unshuffle(x, FACTOR, **how),
        _fold,
        lambda i: (i.unfolded(),),
    ),
    Operator(
        "pixel_shuffle",
        lambda y, **how: pixel_shuffle(y, FACTOR, **how),
        _unfold,
        lambda i: (i.folded(),),
    ),
    Operator(
        "pixel_unshuffle_split",
        lambda x, **how: pixel_unshuffle_split(x, FACTOR, **how),
        _fold_split,
        lambda i: (i.unfolded(),),
    ),
    Operator(
        "pixel_shuffle_concatenate",
        lambda first, second, **how: pixel_shuffle_concatenate(first, second, FACTOR, **how),
        _concatenate_unfold,
        lambda i: (i.half(), i.half()),
    ),
)
