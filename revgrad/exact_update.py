"""An exact merge under stored autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from revgrad.residue import Residue
from revgrad.tracing import untraced


def updated_exactly(coupling: Any, undo: bool, residue: Residue, target: Tensor, *message: Tensor) -> Tensor:
    """The merge of a coupling, or where `undo` its unmerge, in exact arithmetic, with a straight-through gradient."""
    update = _forgetting if coupling.forgets else ExactUpdate.apply
    return update(coupling, undo, residue, target, *message)


class ExactUpdate(torch.autograd.Function):
    """An exact merge (or unmerge) with a straight-through gradient, for stored autograd; backward is the coupling's
    `merge_vjp`.

    Saves the target before the update and the message, all of one shape, if that reads them.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, coupling: Any, undo: bool, residue: Residue, target: Tensor, *message: Tensor
    ) -> Tensor:
        ctx.coupling, ctx.undo = coupling, undo
        values = (target, *message)
        ctx.save_for_backward(*(values if coupling.vjp_reads_values else (x.new_empty(0) for x in values)))
        return (coupling.unmerge_exact if undo else coupling.merge_exact)(residue, target, *message)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: D102
        vjp = ctx.coupling.unmerge_vjp if ctx.undo else ctx.coupling.merge_vjp
        return None, None, None, *vjp(grad, True, *ctx.saved_tensors)


@untraced
def _forgetting(*args: Any) -> Tensor:
    """What forgets changes the residue, which the compiler cannot follow into an autograd Function."""
    return ExactUpdate.apply(*args)
