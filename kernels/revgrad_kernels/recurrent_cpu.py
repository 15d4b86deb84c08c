"""What the recurrent operators share on a CPU, where time goes into activations and, for small tensors, into calls.

Activations are saved instead of recomputed, gradients are written where they belong, and `tanh(x)` is computed as
`2 sigmoid(2 x) - 1`, in a third of the time of `torch.tanh`; it is then off by no more than numbers of size 1 are by
rounding. What an operator computes is defined by its reference.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revgrad_kernels import recurrent
from revgrad_kernels.backend import BackendError, left_to_cpu
from revgrad_kernels.layout import side_by_side_like

SMALL = 2**12
"""States of fewer elements take plain PyTorch, whose graph needs no Python."""

_DTYPES = (torch.float32, torch.float64)


def takes(backend: str, first: Tensor, *others: Tensor | None) -> bool:
    """Whether this code is for these tensors, or None where one is left out: on a CPU, of one dtype in which arithmetic
    is done, and for nobody who needs the reference's graph: compilers and transforms of functions.
    """
    dtype = first.dtype
    if dtype not in _DTYPES or not first.is_cpu:
        return False
    for t in others:  # any() takes longer than all of this
        if t is not None and (t.dtype is not dtype or not t.is_cpu):
            return False
    return left_to_cpu(backend)


class Operator(torch.autograd.Function):
    """An operator; `forward` takes None for the context where there is nothing to save."""

    @classmethod
    def compute(cls, *tensors: Tensor) -> Any:
        """Apply it, without gradients at the cost of the forward pass alone."""
        return cls.apply(*tensors) if torch.is_grad_enabled() else cls.forward(None, *tensors)


def save(ctx: Any, *tensors: Tensor) -> None:
    """Keep tensors for the backward pass, where there is to be one."""
    if ctx is not None:
        ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> tuple[Tensor, ...]:
    """What the forward pass saved.

    Raises:
        BackendError: The gradient itself is to be differentiated.
    """
    if torch.is_grad_enabled():
        raise BackendError(
            "the recurrent operators have no second derivative on a CPU; for one choose backend='reference', or "
            "REVGRAD_KERNELS=reference in the environment"
        )
    return ctx.saved_tensors


def tanh(x: Tensor) -> Tensor:
    """In a tensor of its own."""
    return torch.rsub(torch.add(x, x).sigmoid_(), -1, alpha=-2)


def activate(i: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`sigmoid(i)`, `sigmoid(f)` and `tanh(g)`, each in a tensor of its own."""
    return torch.sigmoid(i), torch.sigmoid(f), tanh(g)


def update(cell: Tensor, i: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """The new cell state, from activated gates."""
    return torch.mul(f, cell).addcmul_(i, g)


Room = tuple[Tensor, Sequence[Tensor]] | tuple[None, Sequence[None]]
"""For gradients side by side: all of it, and its parts; None where they cannot be written where they belong."""


def room(like: Tensor, groups: int, *grads: Tensor) -> Room:
    """For gradients of so many groups of gates, each like a tensor, from incoming gradients, which may be batched."""
    if any(map(torch._C._functorch.is_legacy_batchedtensor, grads)):
        return None, (None,) * groups
    whole = side_by_side_like(like, groups)
    return whole, whole.chunk(groups, 1)


def put(part: Tensor | None, grad: Tensor) -> Tensor:
    """Write a gradient into its part."""
    return grad if part is None else part.copy_(grad)


def sigmoid_backward(grad: Tensor, result: Tensor, part: Tensor | None) -> Tensor:
    """As in `recurrent`, into its part."""
    if part is None:
        return recurrent.sigmoid_backward(grad, result)
    return torch.ops.aten.sigmoid_backward.grad_input(grad, result, grad_input=part)


def tanh_backward(grad: Tensor, result: Tensor, part: Tensor | None) -> Tensor:
    """As in `recurrent`, into its part."""
    if part is None:
        return recurrent.tanh_backward(grad, result)
    return torch.ops.aten.tanh_backward.grad_input(grad, result, grad_input=part)


def pull_back(
    whole: Tensor | None,
    parts: Sequence[Tensor | None],
    grad: Tensor,
    cell: Tensor,
    i: Tensor,
    f: Tensor,
    g: Tensor,
    *more: Tensor,
) -> tuple[Tensor, Tensor]:
    """From the gradient of a new cell state to those of the gates before activation, in what `room` has made, and of
    the old state, `cell`, by way of activated gates. `more` are the gradients of further groups, in their parts.
    """
    found = [
        sigmoid_backward(grad * g, i, parts[0]),
        sigmoid_backward(grad * cell, f, parts[1]),
        tanh_backward(grad * i, g, parts[2]),
    ]
    return torch.cat([*found, *more], 1) if whole is None else whole, grad * f
