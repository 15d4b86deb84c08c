"""Gradients of one evaluation: where they begin and end, and their sums, in which None stands for zero."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge

from revgrad.errors import ReversibilityError


def is_differentiable(x: Tensor) -> bool:
    """Whether a tensor can have a gradient: integers are read and compared alone."""
    return x.is_floating_point() or x.is_complex()


def leaf(x: Tensor) -> Tensor:
    """A stand-in for `x` whose gradient can be asked for (integer tensors have none and pass through)."""
    return x.detach().requires_grad_(is_differentiable(x))


def gradients(
    outputs: Sequence[Tensor | GradientEdge | None],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` that takes None for a zero gradient, and ignores outputs that depend on no input.

    Args:
        outputs: What is differentiated, or where its graph ends; None for what has none.
        grads: Gradients with respect to the outputs, in their shapes.
        inputs: What to differentiate with respect to.
        create_graph: Whether the gradients get a graph of their own; that of the outputs is then kept.

    Returns:
        One gradient per input; None where it is zero.
    """
    roots: list[Tensor | GradientEdge] = []
    values: list[Tensor] = []
    for y, g in zip(outputs, grads, strict=True):
        if y is not None and g is not None and (isinstance(y, GradientEdge) or y.requires_grad):
            roots.append(y)
            values.append(g)
    wanted = [x for x in inputs if x.requires_grad]
    if not roots or not wanted:
        return (None,) * len(inputs)
    # What torch.autograd.grad does after checking in Python what the engine checks anyway, at a third of its time.
    found = iter(
        _engine_run_backward(
            tuple(roots), tuple(values), create_graph, create_graph, tuple(wanted), True, accumulate_grad=False
        )
    )
    return tuple([next(found) if x.requires_grad else None for x in inputs])


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, None being zero."""
    if a is None or b is None:
        return a if b is None else b
    return a + b


def negated(x: Tensor | None) -> Tensor | None:
    """`-x`, None being zero."""
    return None if x is None else -x


def per_sample(x: Tensor) -> Tensor:
    """The sum of all elements of each sample, `[B, ...]` to `[B]`, in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(len(x), -1 if x.numel() else 0).sum(1)


def edge(x: Tensor) -> GradientEdge | None:
    """Where the gradient of a tensor goes, which does not keep its values alive; None where it goes nowhere."""
    return get_gradient_edge(x) if x.requires_grad else None


def filled_for_hooks(grads: tuple[Tensor | None, ...], edges: Sequence[tuple[Any, int]]) -> tuple[Tensor | None, ...]:
    """Zeros for leaves without a gradient that have hooks: under stored autograd these would not be called, but here
    the engine would call them with None, which few hooks expect.
    """
    if all(g is not None for g in grads):
        return grads
    leaves = (getattr(node, "variable", None) for node, _ in edges)
    return tuple(
        torch.zeros_like(x) if g is None and x is not None and x._backward_hooks else g
        for g, x in zip(grads, leaves, strict=True)
    )


class Closed(NamedTuple):
    """The graph of what has been computed."""

    leaves: dict[int, Any]
    """By `id` of a leaf, the node that accumulates its gradient."""
    inner: int
    """The number of all other nodes."""


def newest_node() -> int:
    """A number that grows by one with every node that this thread makes."""
    return torch._C._autograd._get_sequence_nr()


def check_closed(name: str, outputs: Sequence[Tensor], known: Sequence[Tensor]) -> Closed:
    """Raise if what a layer has computed depends on a tensor that would get no gradient.

    Args:
        name: How the error calls the layer.
        outputs: What was computed, with its graph.
        known: The tensors that are differentiated with respect to. What they come from is not looked at.

    Raises:
        ReversibilityError: A tensor that requires a gradient came in some other way than as stream, state, argument or
            parameter.
    """
    expected = {id(x) for x in known}
    seen = {x.grad_fn for x in known}
    nodes = [y.grad_fn for y in outputs if y.grad_fn is not None and y.grad_fn not in seen]
    seen.update(nodes)
    leaves: dict[int, Any] = {}
    inner = 0
    while nodes:
        node = nodes.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            if id(variable) not in expected:
                raise ReversibilityError(
                    f"{name}: the transform reads a tensor of shape {tuple(variable.shape)} that requires a gradient, "
                    "but is neither its input nor its state nor a conditioning argument nor a parameter of its module, "
                    "so that its gradient would be lost: pass it as an argument (chain(x, name=tensor)), make it a "
                    "parameter, or detach it"
                )
            leaves[id(variable)] = node
        else:
            inner += 1
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return Closed(leaves, inner)
