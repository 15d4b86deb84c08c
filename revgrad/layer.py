"""The protocol of a reversible layer: a map on a tuple of streams that can be run, undone and rewound."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revgrad.errors import StreamError
from revgrad.gradients import check_closed, gradients, leaf, negated, newest_node
from revgrad.in_place import Unchanged
from revgrad.leftovers import Leftovers
from revgrad.residue import Residue

Streams = tuple[Tensor, ...]
State = tuple[Tensor, ...]
Grads = tuple[Tensor | None, ...]
Arguments = Mapping[str, Any]
Layout = tuple[tuple[int, ...], ...] | None
"""The strides of each stream that a transform reads; None where a layer has not said."""
Note = tuple[float, ...]
"""A fingerprint that takes no tensor memory."""

NO_ARGUMENTS: Arguments = MappingProxyType({})


@dataclass(slots=True)
class LayerCall:
    """One application of a layer: what it is given besides the streams, and what it leaves besides them."""

    name: str = "layer"
    """How errors call the layer."""
    state: State = ()
    """Conditioning state that the layer reads; `()` for a stateless one."""
    new_state: State = ()
    """Set by the layer: the state it hands on."""
    arguments: Arguments = field(default_factory=dict)
    """Conditioning that the layer accepts, by name."""
    strides: Layout = None
    """Memory layout of each stream that a transform read, set by the layer: a second evaluation reads the same
    layout, since kernels for other layouts round differently, and dropout draws in the order of memory."""
    layout: Layout = None
    """Those strides, where `run` or `undo` is itself a second evaluation; else None."""
    cell: Tensor | None = None
    """The cell after the call, for a layer that recovers it (`inverted_cell`): given to `undo` and `rewind`, whose
    `state` is without it. They leave the cell before it in its place."""
    residue: Residue | None = None
    """Where exact merges keep what they forget; None in float arithmetic."""
    replay: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    """Context that makes a second evaluation see what the first one saw (random numbers, autocast)."""
    noting: bool = False
    """Whether a backward pass will evaluate the layer again: it may leave a note of what it then wants to find."""
    note: Note | None = None
    """What the layer has noted."""
    leftovers: Leftovers | None = None
    """Set by a rewind: what is to be checked when it has returned."""
    inverting: bool = False
    """Whether a chain is inverted (`chain.inverse`): a layer that its first batch sets does not take this for one."""
    log_det_grad: Tensor | None = None
    """Gradient with respect to the layer's log-determinant, `[B]`, where a rewind is to pull it back. The rewind takes
    it, that is, leaves None."""


@dataclass
class StreamGrads:
    """What goes backwards through a chain. A layer replaces the items, and so frees what nobody else holds."""

    streams: list[Tensor]
    grads: list[Tensor | None]
    """Gradients with respect to the streams; None stands for zero."""


class Rewound(NamedTuple):
    """What `rewind` finds besides streams and gradients."""

    state_grads: Grads
    parameter_grads: Grads


class ReversibleLayer(nn.Module):
    """Base class of everything that can stand in a reversible chain.

    A subclass implements `run` and `undo`. The default `rewind` then works for any bijection: it undoes the layer
    and runs it once more with gradients. `Coupling` does better, with a single evaluation of its transform.
    """

    stateful = False
    """Whether the layer reads a conditioning state and returns a new one."""
    evaluations_in_rewind = 2
    """How often `rewind` evaluates what the forward pass evaluates once."""
    carries = 0
    """How many trailing tensors of the state go to the next stateful layer of the chain instead of the next time step.
    """

    inverted_cell: int | None = None
    """Position in the layer's own state of a cell that exact arithmetic recovers instead of keeping it, see
    `revgrad.cell`.
    """

    forgets = False
    """Whether exact arithmetic needs a residue to undo the layer."""

    unread = 0
    """How many trailing streams a rewind of the layer leaves as they are, since no layer reads them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Only chains are called.

        Raises:
            StreamError: Always.
        """
        name = type(self).__name__
        raise StreamError(
            f"{name}: a layer is not called by itself: put it into a chain, ReversibleSequential({name}(...)), and "
            "call that"
        )

    def chosen_options(self) -> dict[str, Any]:
        """By name, the options of a chain that are not at their defaults; a layer has none."""
        return {}

    def recovered_cell(self, exact: bool) -> int | None:
        """Position in the layer's own state of the cell that is recovered; None where float arithmetic keeps it."""
        return self.inverted_cell if exact else None

    def updates(self) -> int | None:
        """Index of the only stream that the layer changes; None where it may change any."""
        return None

    def has_exact_form(self) -> bool:
        """Whether the layer maps grid values to grid values, one to one, in exact arithmetic."""
        return False

    def accepts(self, name: str) -> bool:
        """Whether the layer reads a conditioning argument of this name, from `call.arguments`."""
        return False

    def run(self, streams: Streams, call: LayerCall) -> Streams:
        """Apply the layer; differentiable. Reads `call.state`, sets `call.new_state`."""
        raise TypeError(f"{type(self).__name__} does not define run(streams, call)")

    def undo(self, streams: Streams, call: LayerCall) -> Streams:
        """The inverse of `run`, given the same `call.state`; differentiable, sets `call.new_state` likewise."""
        raise TypeError(f"{type(self).__name__} does not define undo(streams, call), its inverse")

    def log_det(self, streams: Streams, call: LayerCall) -> Tensor | None:
        """The logarithm of the absolute determinant of the Jacobian of `run`, per sample of the first dimension.

        Args:
            streams: What `run` reads.
            call: The call.

        Returns:
            `[B]`, differentiable; None where it is zero for every input.

        Raises:
            StreamError: The layer does not say, which is the default.
        """
        raise StreamError(
            f"{call.name}: {type(self).__name__} does not say what its log-determinant is: define "
            "log_det(streams, call), or log_derivative(target, *message) in a coupling; return None where it is zero"
        )

    def run_log_det(self, streams: Streams, call: LayerCall) -> tuple[Streams, Tensor | None]:
        """`run`, and the log-determinant of its Jacobian."""
        return self.run(streams, call), self.log_det(streams, call)

    def undo_log_det(self, streams: Streams, call: LayerCall) -> tuple[Streams, Tensor | None]:
        """`undo`, and the log-determinant of its Jacobian."""
        out = self.undo(streams, call)
        return out, negated(self.log_det(out, call))

    def rewind(self, backward: StreamGrads, call: LayerCall, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """Recover the inputs of `run` from its outputs, and pull the gradients back.

        Args:
            backward: Outputs of `run` and gradients with respect to them; becomes inputs and gradients of those. Its
                tensors may be the caller's: they are replaced, never changed.
            call: The call; its state is that which `run` read.
            state_grads: Gradients with respect to `call.new_state`.
            wrt: Parameters and conditioning tensors to differentiate with respect to.
        """
        return _rewind(self.undo, self.run, self.run_log_det, backward, call, state_grads, wrt)

    def rewind_undo(self, backward: StreamGrads, call: LayerCall, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """As `rewind`, for an application of `undo`: what `Inverse` calls."""
        return _rewind(self.run, self.undo, self.undo_log_det, backward, call, state_grads, wrt)


class Inverse(ReversibleLayer):
    """A layer run backwards, with the same parameters: the decoder of a two-way autoencoder (CrevNet, eq. 4).

    Raises:
        StreamError: It is no reversible layer.
    """

    def __init__(self, layer: ReversibleLayer) -> None:
        super().__init__()
        if not isinstance(layer, ReversibleLayer):
            raise StreamError(
                f"Inverse: a {type(layer).__name__} is not a reversible layer: put a module inside a coupling, "
                "AdditiveCoupling(module), and several layers into a ReversibleSequential(*layers)"
            )
        self.layer = layer
        self.stateful = layer.stateful
        self.carries = layer.carries
        self.evaluations_in_rewind = layer.evaluations_in_rewind

    def updates(self) -> int | None:
        """What the inner layer updates."""
        return self.layer.updates()

    def has_exact_form(self) -> bool:
        """Whether the inner layer has one."""
        return self.layer.has_exact_form()

    def accepts(self, name: str) -> bool:
        """What the inner layer accepts."""
        return self.layer.accepts(name)

    def run(self, streams: Streams, call: LayerCall) -> Streams:
        """Undo the inner layer."""
        return self.layer.undo(streams, call)

    def undo(self, streams: Streams, call: LayerCall) -> Streams:
        """Run the inner layer."""
        return self.layer.run(streams, call)

    def run_log_det(self, streams: Streams, call: LayerCall) -> tuple[Streams, Tensor | None]:
        """Undo the inner layer."""
        return self.layer.undo_log_det(streams, call)

    def undo_log_det(self, streams: Streams, call: LayerCall) -> tuple[Streams, Tensor | None]:
        """Run the inner layer."""
        return self.layer.run_log_det(streams, call)

    def rewind(self, backward: StreamGrads, call: LayerCall, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """Rewind the inner layer's `undo`."""
        return self.layer.rewind_undo(backward, call, state_grads, wrt)

    def rewind_undo(self, backward: StreamGrads, call: LayerCall, state_grads: Grads, wrt: Sequence[Tensor]) -> Rewound:
        """Rewind the inner layer's `run`."""
        return self.layer.rewind(backward, call, state_grads, wrt)


def unwrapped(layer: Any) -> tuple[Any, bool]:
    """The layer inside all inverses around it, and whether it is run backwards."""
    inverted = False
    while isinstance(layer, Inverse):
        layer, inverted = layer.layer, not inverted
    return layer, inverted


def _undo_changed(name: str, x: Tensor) -> StreamError:
    return StreamError(
        f"{name}: its inverse changed what it was given in place, a stream of shape {tuple(x.shape)}, which is the "
        "output of the chain or of a layer: make the operation out of place"
    )


StreamMap = Callable[[Streams, LayerCall], Streams]
"""`run` or `undo` of a layer."""


def _rewind(
    undo: StreamMap,
    run: StreamMap,
    run_log_det: Callable[[Streams, LayerCall], tuple[Streams, Tensor | None]],
    backward: StreamGrads,
    call: LayerCall,
    state_grads: Grads,
    wrt: Sequence[Tensor],
) -> Rewound:
    """The generic rewind: undo without gradients, then run again with them."""
    with torch.no_grad(), call.replay(), Unchanged(backward.streams, partial(_undo_changed, call.name)):
        backward.streams[:] = [x.detach() for x in undo(tuple(backward.streams), call)]
    inputs = tuple(map(leaf, backward.streams))
    states = tuple(map(leaf, call.state))
    others = (*states, *wrt)
    # What the second run forgets again must not end up in the residue that later layers undo.
    residue = call.residue.clone(words=False, keep=False) if call.residue is not None else None
    again = LayerCall(name=call.name, state=states, arguments=call.arguments, residue=residue)
    log_det_grad, call.log_det_grad = call.log_det_grad, None
    before = newest_node()
    with torch.enable_grad(), call.replay():
        outputs, log_det = (run(inputs, again), None) if log_det_grad is None else run_log_det(inputs, again)
    results = (*outputs, *again.new_state, *(() if log_det is None else (log_det,)))
    call.leftovers = Leftovers(inputs, others, check_closed(call.name, results, (*inputs, *others)), before)
    grads = (*backward.grads, *state_grads, *(() if log_det is None else (log_det_grad,)))
    found = gradients(results, grads, (*inputs, *others))
    n, m = len(inputs), len(states)
    backward.grads[:] = found[:n]
    return Rewound(found[n : n + m], found[n + m :])
