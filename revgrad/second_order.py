"""A backward pass that can itself be differentiated, for `create_graph=True`: gradient penalties, Hessians.

The input is recovered from the output with a graph, so that it depends on the output, and through it on the true
input. From there the chain runs once more as under stored autograd, activations and all: twice the forward pass and
the memory of stored mode, until the graph is freed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from revgrad.chain import run_chain, undo_chain
from revgrad.errors import ReversibilityError
from revgrad.gradients import check_closed, gradients
from revgrad.layer import Grads, Streams
from revgrad.offload import Stowed
from revgrad.program import CORE, Program
from revgrad.replay import Snapshot
from revgrad.tape import Tape


class DifferentiableGradients:
    """All gradients of one run of a chain, found at once and with a graph. To the nodes of the graph it is a walk that
    has come to its end.

    Args:
        program: What was run; its arguments are filled with `parameters`.
        snapshot: What it depended on.
        tape: What it left.
        outputs: Its outputs, with their graph.
        grads: Gradients with respect to the outputs, then to the final states.
        parameters: Those of the snapshot and the conditioning tensors, with their graph.
        compare: Raises unless the streams are those of a fingerprint.
        unrolled: Whether it was an unroll, if only of one time step.

    Raises:
        ReversibilityError: Time steps, exact arithmetic, states that go from layer to layer, or states offloaded.
    """

    def __init__(
        self,
        program: Program,
        snapshot: Snapshot,
        tape: Tape,
        outputs: Streams,
        grads: Sequence[Tensor | None],
        parameters: Sequence[Tensor],
        compare: Callable[[Streams, Tensor], None],
        *,
        unrolled: bool,
    ) -> None:
        (segment,) = tape.segments[:1]
        if program.exact or unrolled or segment.state.carry:
            raise ReversibilityError(
                "second derivatives (create_graph=True) of exact arithmetic, of an unroll and of states that go from "
                "layer to layer are not available: choose mode='stored', and arithmetic='float'"
            )
        if any(isinstance(x, Stowed) for x in segment.state.tensors()):
            raise ReversibilityError(
                "second derivatives (create_graph=True) are not available with offload=True, which keeps the values "
                "of states and not their graph: choose offload=False"
            )
        links, kept = program.core, tape.saved.get((0, CORE), ())
        read, layouts = [r.state for r in kept], [r.strides for r in kept]
        with snapshot.standing_in(parameters):
            streams = undo_chain(
                links, outputs, read, None, around=snapshot.replaying, arguments=program.arguments.core, layouts=layouts
            )
        compare(program.recovered(0, streams), tape.fingerprints[0, CORE, 0])
        # The second run reads aliases, so that gradients end where it begins.
        streams, states = _aliases(streams), segment.state.replace(_aliases(segment.state.tensors()))
        aliases = _aliases(parameters)
        conditioned = program.emptied().filled(aliases[len(snapshot.parameters) :])
        with snapshot.standing_in(aliases):
            again, final = run_chain(
                links,
                streams,
                states,
                None,
                around=snapshot.replaying,
                arguments=conditioned.arguments.core,
                layouts=layouts,
            )
        results = (*again, *final.tensors())
        known = (*streams, *states.tensors(), *aliases)
        check_closed("the chain", results, known)
        found = iter(gradients(results, grads, known, create_graph=True))
        self._inputs = tuple(next(found) for _ in streams)
        self._states = tuple(next(found) for _ in states.tensors())
        self._parameters = tuple(found)

    def to(self, application: int) -> None:
        """Nothing is left to do."""

    def to_the_end(self) -> None:
        """Nothing is left to do."""

    def input_grads(self) -> Grads:
        """Gradients of the inputs."""
        return self._inputs

    def state_grads(self) -> Grads:
        """Gradients of the initial state."""
        return self._states

    def take(self, indices: Sequence[int]) -> Grads:
        """Gradients of these parameters and conditioning tensors."""
        return tuple(self._parameters[i] for i in indices)


def _aliases(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # Not views, through which a sparse gradient cannot go.
    return tuple(torch.ops.aten.alias.default(x) for x in tensors)
