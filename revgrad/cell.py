"""Cell states that are recovered instead of kept.

An LSTM's cell update `c' = f c + i g` is itself a merge: scaled by `0 < f < 1`, then added to. Where the gates read the
source and the other states but not the cell, exact arithmetic gives the cell back from the new one, for about
`-log2 f` bits per element in the residue, and nothing has to be computed twice for it.

The transform makes that one operation by calling the `update` that it is given. Going forwards, `update` returns the
merged cell; going backwards, the new cell that is known already. So a transform is an ordinary function in both
directions, evaluated once in each.
"""

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from revgrad_kernels.backend import converted
from revgrad_kernels.recurrent import sigmoid_backward
from revgrad_kernels.reservoir import GATE_BITS, to_numerator
from torch import Tensor
from torch.autograd.function import once_differentiable

from revgrad.errors import StreamError
from revgrad.layer import LayerCall, State
from revgrad.residue import Residue, grid_of
from revgrad.tracing import records_graph, untraced


class CellUpdate(Protocol):
    """How a transform updates its cell."""

    def __call__(self, cell: Tensor, decay: Tensor, increment: Tensor) -> Tensor:
        """The new cell, `sigmoid(decay) * cell + increment`; all of one shape.

        Args:
            cell: The cell in the state that the transform has been given.
            decay: Logits of the forget gate, any float dtype.
            increment: What is added, any float dtype.
        """


def update_cell(cell: Tensor, decay: Tensor, increment: Tensor) -> Tensor:
    """The `CellUpdate` of float arithmetic, and the default for the `update` of a transform."""
    return torch.sigmoid(decay) * cell + increment


class _Update(ABC):
    """A `CellUpdate` for one evaluation of a transform, which sees a stand-in for the cell: NaN in its shape.

    So whatever else a transform computes from the cell is found out, in the forward pass already.
    """

    def __init__(self, name: str, residue: Residue, like: Tensor, *, leaf: bool) -> None:
        self.name, self.residue, self.dtype = name, residue, like.dtype
        nothing = torch.full((), torch.nan, dtype=like.dtype, device=like.device)
        self.stand_in = nothing.expand(like.shape).requires_grad_(leaf)
        self.new: Tensor | None = None

    @untraced
    def __call__(self, cell: Tensor, decay: Tensor, increment: Tensor) -> Tensor:
        if cell is not self.stand_in or self.new is not None:
            again = "calls update twice" if self.new is not None else "gives update something else than the cell"
            raise StreamError(f"{self.name}: the transform {again}; it is to update the cell it was given, once")
        if not decay.shape == increment.shape == cell.shape:
            raise StreamError(
                f"{self.name}: update needs a decay and an increment of the cell's shape {tuple(cell.shape)}, got "
                f"{tuple(decay.shape)} and {tuple(increment.shape)}"
            )
        # Contiguous, because on a CPU the last bits of a sigmoid depend on the strides.
        self.new = self._updated(converted(decay, self.dtype).contiguous(), converted(increment, self.dtype))
        return self.new

    @abstractmethod
    def _updated(self, decay: Tensor, increment: Tensor) -> Tensor:
        """The new cell, from a decay and an increment that have been checked."""

    def check(self, found: Tensor) -> None:
        """Raise unless the transform has returned the updated cell; forgets it.

        Raises:
            StreamError: It has not.
        """
        new, self.new = self.new, None
        if new is None or found is not new:
            raise StreamError(
                f"{self.name}: the transform must call update(cell, decay, increment), and return what it returns in "
                "the cell's place of the new state"
            )


class CellMerge(_Update):
    """Forwards: the cell is merged exactly, what it forgets goes to the residue."""

    def __init__(self, name: str, residue: Residue, cell: Tensor) -> None:
        super().__init__(name, residue, cell, leaf=False)
        self._cell = cell

    def _updated(self, decay: Tensor, increment: Tensor) -> Tensor:
        if records_graph():
            new = _MergeFunction.apply(self.residue, self._cell, decay, increment)
        else:
            new = _merge(self.residue, self._cell, torch.sigmoid(decay), increment)
        self.residue.watch(f"{self.name}, cell (only update may read the old one)", new)
        return new


class CellRecall(_Update):
    """Backwards: the new cell is known; the cell before follows once all later merges are undone, by `recover`.

    With gradients the stand-in is a leaf, which gets the gradient of the cell that it stands for.
    """

    def __init__(self, name: str, residue: Residue, new: Tensor) -> None:
        super().__init__(name, residue, new, leaf=torch.is_grad_enabled())
        self._known = new.detach()
        self._recovered: list[Tensor] = []
        self._merged: tuple[Tensor, Tensor] | None = None

    def _updated(self, decay: Tensor, increment: Tensor) -> Tensor:
        gate = torch.sigmoid(decay.detach())
        self._merged = gate, increment.detach()
        # The node gets the list and not this object, which for a while holds what the node returns.
        return _RecallFunction.apply(self._known, gate, self._recovered, self.stand_in, decay, increment)

    def recover(self) -> Tensor:
        """The cell before the update; to be called once."""
        if self._merged is None:
            raise StreamError(f"{self.name}: the cell has not been updated")
        (gate, increment), self._merged = self._merged, None
        with torch.no_grad():
            self._recovered.append(_unmerge(self.residue, self._known, gate, increment))
        return self._recovered[0]


ExactCellUpdate = CellMerge | CellRecall
"""The `CellUpdate` of exact arithmetic, in either direction."""


class _MergeFunction(torch.autograd.Function):
    """The exact cell update with a straight-through gradient, for stored autograd. Saves the cell and the gate."""

    @staticmethod
    def forward(ctx: Any, residue: Residue, cell: Tensor, decay: Tensor, increment: Tensor) -> Tensor:
        gate = torch.sigmoid(decay)
        ctx.save_for_backward(cell, gate)
        return _merge(residue, cell, gate, increment)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_vjp(grad, *ctx.saved_tensors)


class _RecallFunction(torch.autograd.Function):
    """`_MergeFunction` where the result is known and the cell is not, until the backward pass needs it.

    In stored autograd the update is one node among those of the transform. It is here too, so that gradients flow, and
    are summed, as there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        known: Tensor,
        gate: Tensor,
        recovered: list[Tensor],
        stand_in: Tensor,
        decay: Tensor,
        increment: Tensor,
    ) -> Tensor:
        ctx.gate, ctx.recovered = gate, recovered
        return known.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_vjp(grad, ctx.recovered[0], ctx.gate)


def _merge(residue: Residue, cell: Tensor, gate: Tensor, increment: Tensor) -> Tensor:
    kept = _numerator(gate)
    scaled = residue.scale(cell, to_numerator(kept))
    # An integer is never NaN: what is wrong with a gate would be lost.
    return scaled.add_(grid_of(cell).snap(increment)).add_(kept.mul_(0))


def _unmerge(residue: Residue, new: Tensor, gate: Tensor, increment: Tensor) -> Tensor:
    return residue.unscale(new - grid_of(new).snap(increment), to_numerator(_numerator(gate)))


def _vjp(grad: Tensor, cell: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of cell, decay and increment, straight through the rounding, with the rounded gate where it scaled."""
    return grad * _numerator(gate).mul_(2.0**-GATE_BITS), sigmoid_backward(grad * cell, gate), grad


def _numerator(gate: Tensor) -> Tensor:
    """`n` of the gate `n / 2^16`, at least 1, as a float: NaN where the gate is."""
    return (gate * 2**GATE_BITS).round_().clamp_min_(1)


def update_for(
    inverted_cell: int | None, call: LayerCall, state: State, *, known: bool
) -> tuple[ExactCellUpdate | None, State]:
    """What a transform is to update its cell with (None where it is kept), and the state that it is to be given.

    Args:
        inverted_cell: The cell's position.
        call: The call.
        state: Its state; where the cell after the step is known, without the cell.
        known: Whether it is, rather than the cell before.

    Raises:
        StreamError: It is to be known and is not.
    """
    if inverted_cell is None or call.residue is None:
        return None, state
    if not known:
        merge = CellMerge(call.name, call.residue, state[inverted_cell])
        return merge, replaced_at(state, inverted_cell, merge.stand_in)
    if call.cell is None:
        raise StreamError(
            f"{call.name}: a cell that is inverted can only be recovered from the state after the step: give it to "
            "inverse as new_states=; a coupling inside Inverse(...) is to be made without inverted_cell"
        )
    recall = CellRecall(call.name, call.residue, call.cell)
    return recall, completed(state, inverted_cell, recall.stand_in)


def without(state: State, position: int | None) -> State:
    """A state without its cell."""
    return state if position is None else (*state[:position], *state[position + 1 :])


def completed(state: State, position: int, cell: Tensor) -> State:
    """A state that was without its cell, with it."""
    return (*state[:position], cell, *state[position:])


def replaced_at(state: State, position: int | None, cell: Tensor) -> State:
    """A state with another cell."""
    return state if position is None else completed(without(state, position), position, cell)
