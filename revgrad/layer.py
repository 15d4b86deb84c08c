"""The protocol of a reversible layer: a map on a tuple of streams that can be run, undone and rewound."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revgrad.errors import ReversibilityError
from revgrad.residue import Residue

Streams = tuple[Tensor, ...]
State = tuple[Tensor, ...]
Grads = tuple[Tensor | None, ...]


@dataclass
class Step:
    """One application of a layer: what it is given besides the streams, and what it leaves besides them."""

    name: str = "layer"
    """How errors call the layer."""
    state: State = ()
    """Conditioning state that the layer reads; `()` for a stateless one."""
    new_state: State = ()
    """Set by the layer: the state it hands on."""
    strides: tuple[int, ...] | None = None
    """Memory layout of the stream that a transform read, set by the layer: a second evaluation reads the same
    layout, since kernels for other layouts round differently."""
    residue: Residue | None = None
    """Where exact merges keep what they forget; None in float arithmetic."""
    replay: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    """Context that makes a second evaluation see what the first one saw (random numbers, autocast)."""


class Rewound(NamedTuple):
    """The result of `rewind`: the layer's inputs, and the gradients with respect to them."""

    streams: Streams
    grads: Grads
    state_grads: Grads
    parameter_grads: Grads


class ReversibleLayer(nn.Module):
    """Base class of everything that can stand in a reversible chain.

    A subclass implements `run` and `undo`. The default `rewind` then works for any bijection: it undoes the layer
    and runs it once more with gradients. `Coupling` does better, with a single evaluation of its transform.
    """

    stateful = False
    """Whether the layer reads a conditioning state and returns a new one."""
    carries = 0
    """How many trailing tensors of the state go to the next stateful layer of the chain instead of the next time step.
    """

    def updates(self) -> int | None:
        """Index of the only stream that the layer changes; None where it may change any."""
        return None

    def run(self, streams: Streams, step: Step) -> Streams:
        """Apply the layer; differentiable. Reads `step.state`, sets `step.new_state`."""
        raise TypeError(f"{type(self).__name__} does not define run(streams, step)")

    def undo(self, streams: Streams, step: Step) -> Streams:
        """The inverse of `run`, given the same `step.state`; differentiable, sets `step.new_state` likewise."""
        raise TypeError(f"{type(self).__name__} does not define undo(streams, step), its inverse")

    def rewind(self, streams: Streams, grads: Grads, step: Step, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """Recover the inputs of `run` from its outputs, and pull the gradients back.

        Args:
            streams: Outputs of `run`.
            grads: Gradients with respect to them; None stands for zero.
            step: The application; its state is that which `run` read.
            state_grads: Gradients with respect to `step.new_state`.
            wrt: Parameters to differentiate with respect to.
        """
        return _rewind(self.undo, self.run, streams, grads, step, state_grads, wrt)

    def rewind_undo(
        self, streams: Streams, grads: Grads, step: Step, state_grads: Grads, wrt: Sequence[Tensor]
    ) -> Rewound:
        """As `rewind`, for an application of `undo`: what `Inverse` calls."""
        return _rewind(self.run, self.undo, streams, grads, step, state_grads, wrt)

    def extra_repr(self) -> str:
        """Nothing by default."""
        return ""


class Inverse(ReversibleLayer):
    """A layer run backwards, with the same parameters: the decoder of a two-way autoencoder (eq. 4)."""

    def __init__(self, layer: ReversibleLayer) -> None:
        super().__init__()
        self.layer = layer
        self.stateful = layer.stateful
        self.carries = layer.carries

    def updates(self) -> int | None:
        """What the inner layer updates."""
        return self.layer.updates()

    def run(self, streams: Streams, step: Step) -> Streams:
        """Undo the inner layer."""
        return self.layer.undo(streams, step)

    def undo(self, streams: Streams, step: Step) -> Streams:
        """Run the inner layer."""
        return self.layer.run(streams, step)

    def rewind(self, streams: Streams, grads: Grads, step: Step, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """Rewind the inner layer's `undo`."""
        return self.layer.rewind_undo(streams, grads, step, state_grads, wrt)

    def rewind_undo(
        self, streams: Streams, grads: Grads, step: Step, state_grads: Grads, wrt: Sequence[Tensor]
    ) -> Rewound:
        """Rewind the inner layer's `run`."""
        return self.layer.rewind(streams, grads, step, state_grads, wrt)


def leaf(x: Tensor) -> Tensor:
    """A stand-in for `x` whose gradient can be asked for (integer tensors have none and pass through)."""
    return x.detach().requires_grad_(x.is_floating_point() or x.is_complex())


def gradients(outputs: Sequence[Tensor], grads: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Grads:
    """`torch.autograd.grad` that takes None for a zero gradient and for an output that depends on no input."""
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not pairs or not wanted:
        return (None,) * len(inputs)
    found = iter(torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)


def check_closed(name: str, outputs: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    """Raise if what a layer has computed depends on a tensor that would get no gradient.

    Args:
        name: How the error calls the layer.
        outputs: What was computed, with its graph.
        known: The tensors that are differentiated with respect to.

    Raises:
        ReversibilityError: A tensor that requires a gradient came in some other way than as stream, state or parameter.
    """
    expected = {id(x) for x in known}
    nodes = [y.grad_fn for y in outputs if y.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in expected:
            raise ReversibilityError(
                f"{name}: the transform reads a tensor of shape {tuple(variable.shape)} that requires a gradient, but "
                "is neither its input nor its state nor a parameter of its module, so that its gradient would be lost: "
                "make it a parameter, pass it as state, or detach it"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


Run = Callable[[Streams, Step], Streams]


def _rewind(
    undo: Run, run: Run, streams: Streams, grads: Grads, step: Step, state_grads: Grads, wrt: Sequence[Tensor]
) -> Rewound:
    """The generic rewind: undo without gradients, then run again with them."""
    with torch.no_grad(), step.replay():
        inputs = undo(streams, step)
    inputs = tuple(map(leaf, inputs))
    states = tuple(map(leaf, step.state))
    # What the second run forgets again must not end up in the residue that later layers undo.
    residue = step.residue.clone(words=False) if step.residue is not None else None
    again = Step(name=step.name, state=states, residue=residue)
    with torch.enable_grad(), step.replay():
        outputs = run(inputs, again)
    check_closed(step.name, (*outputs, *again.new_state), (*inputs, *states, *wrt))
    found = gradients((*outputs, *again.new_state), (*grads, *state_grads), (*inputs, *states, *wrt))
    n, m = len(inputs), len(states)
    return Rewound(tuple(x.detach() for x in inputs), found[:n], found[n : n + m], found[n + m :])
