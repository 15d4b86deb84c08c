"""The autograd Function: a whole program with nothing stored but outputs, conditioning states and residue."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from revgrad.chain import ChainGradients, ChainState, Read, fingerprint, first_updates, rewind_chain
from revgrad.errors import ReversibilityError
from revgrad.layer import Grads, Streams, leaf
from revgrad.program import Program
from revgrad.replay import Snapshot
from revgrad.residue import Residue

# Relative error of the recovered input from which a gradient is taken for wrong.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 0.25, torch.float16: 0.1}


@dataclass
class Segment:
    """Consecutive time steps whose states are recomputed together, or all of them where every state is kept."""

    first: int
    last: int
    state: ChainState
    """The state that the first step reads."""
    features: Streams
    """The core's output of the step before, for a segment whose first step is not given an input."""
    residue: Residue | None
    """A copy from the start of the segment, without its spilled words."""


@dataclass
class Tape:
    """What the forward pass leaves for the backward pass, besides outputs and parameters."""

    segments: list[Segment] = field(default_factory=list)
    read: dict[tuple[int, int], list[Read]] = field(default_factory=dict)
    """Per time step and part (0 entry, 1 core, 2 exit), what each layer has read."""
    residue: Residue | None = None
    fingerprints: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Per time step and part (0 entry, 1 core), what the part's recovered input is compared with."""


class Reversible(torch.autograd.Function):
    """`outputs, state = program(inputs, state)`, recomputed backwards.

    Forward, per time step t: `f_t = core(entry(x_t) or f_(t-1), s_(t-1))`, `y_t = exit(f_t)`, all without a graph.
    Backward, last step first: every layer is undone from its output and differentiated in the same evaluation of its
    transform.

    Tensor inputs, in order: the given inputs, the initial state, the parameters. Outputs: one tensor per stream,
    time first (`[T, ...]`; without the time dimension where the program has a single unstacked step), then the final
    state.

    Saved with `save_for_backward`, so that autograd notices when they are changed in place: the outputs (all
    activations are recovered from them), the states that were read (they cannot be recovered), the parameters (no
    copies), the given inputs where states are recomputed (no copies), and the residue. Random states and flags are
    kept in the snapshot.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        program: Program,
        snapshot: Snapshot,
        given_per_step: int,
        stacked: bool,
        state: ChainState,
        *tensors: Tensor,
    ) -> Any:
        count = given_per_step * sum(program.fed)
        given = _group(program, given_per_step, tensors[:count])
        with _uncached_autocast():
            outputs, final, tape = _forward(program, snapshot, given, state.replace(tensors[count:]), stacked)
        inputs = {x.untyped_storage().data_ptr() for x in tensors[:count]}
        # A stream that no layer has touched would otherwise alias the caller's tensor.
        outputs = tuple(x.clone() if x.untyped_storage().data_ptr() in inputs else x for x in outputs)
        handed_on = tuple(x.clone() if any(x is y for y in tensors) else x for x in final.tensors())
        ctx.set_materialize_grads(False)
        ctx.program, ctx.snapshot, ctx.stacked, ctx.count, ctx.state = program, snapshot, stacked, count, state
        ctx.given_per_step, ctx.streams = given_per_step, len(outputs)
        kept_inputs = tensors[:count] if program.keep_states_every > 1 else ()
        ctx.tape_layout, kept = _pack(tape)
        ctx.kept_inputs = len(kept_inputs)
        ctx.save_for_backward(*outputs, *snapshot.parameters, *kept_inputs, *kept)
        return (*outputs, *handed_on)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # noqa: D102
        if torch.is_grad_enabled():
            raise ReversibilityError(
                "second derivatives through a reversible chain are not available (create_graph=True recomputes "
                "nothing twice): choose mode='stored' for gradient penalties and Hessians"
            )
        program, snapshot, n = ctx.program, ctx.snapshot, ctx.streams
        outputs, parameters, given, tape = _unsave(ctx)
        stand_ins = [leaf(p) if p.requires_grad else p.detach() for p in parameters]
        gradients = ChainGradients(stand_ins, len(program.core), len(ctx.state.carry))
        final_grads = ctx.state.replace(grads[n:])
        gradients.states, gradients.carry = list(final_grads.layers), final_grads.carry
        stream_grads = grads[:n] if ctx.stacked else tuple(g if g is None else g[None] for g in grads[:n])
        streams = outputs if ctx.stacked else tuple(y[None] for y in outputs)
        wanted = ctx.needs_input_grad[5 : 5 + ctx.count]
        entry = [parameters[i].requires_grad for _, layer in program.entry for i in snapshot.indices_of(layer)]
        walk = _Backward(
            program,
            snapshot,
            tape,
            gradients,
            _group(program, ctx.given_per_step, given),
            inputs_wanted=any(wanted),
            entry_wanted=any(wanted) or any(entry),
        )
        with snapshot.replaying_all(stand_ins):
            input_grads = walk.run(streams, stream_grads) or [None] * ctx.count
        state_grads = [g for s in gradients.states for g in s] + list(gradients.carry)
        return (None,) * 5 + (*input_grads, *state_grads, *gradients.total)


def _forward(
    program: Program, snapshot: Snapshot, given: list[Streams | None], state: ChainState, stacked: bool
) -> tuple[Streams, ChainState, Tape]:
    """Run all time steps without a graph, keeping what the tape needs."""
    recompute = program.keep_states_every > 1
    length = program.keep_states_every if recompute else program.steps
    tape = Tape(residue=Residue(keep=not recompute) if program.exact else None)
    residue = tape.residue
    features: Streams = ()
    outputs: Streams = ()
    device = next(x.device for streams in given if streams is not None for x in streams)

    def recording(application: int) -> Any:
        return snapshot.recording(application, device)

    for t in range(program.steps):
        if t % length == 0:
            start = residue.clone(words=False) if residue is not None and recompute else None
            before = () if program.fed[t] else features
            tape.segments.append(Segment(t, min(t + length, program.steps) - 1, state, before, start))
        entered = given[t]
        if entered is not None:
            entered = program.enter(entered, residue)
            if program.entry:
                tape.fingerprints[t, 0] = fingerprint(entered)

        def keep(part: int, read: Read, t: int = t) -> None:
            if part != 1 or not recompute:
                tape.read.setdefault((t, part), []).append(read)

        def core_reads(streams: Streams, t: int = t) -> None:
            tape.fingerprints[t, 1] = fingerprint(streams)

        features, state = program.run_core(t, entered, features, state, residue, recording, keep, core_reads)
        y = program.run_exit(t, features, residue, recording, keep)
        if not stacked:
            outputs = y
        else:
            if t == 0:
                outputs = tuple(x.new_empty((program.steps, *x.shape)) for x in y)
            for whole, part in zip(outputs, y, strict=True):
                whole[t] = part
    if residue is not None:
        residue.check_range()
    snapshot.check_buffers()
    if recompute:
        tape.residue = None
    return outputs, state, tape


def _unsave(ctx: Any) -> tuple[Streams, Streams, Streams, Tape]:
    """Outputs, parameters, kept inputs and tape. The tape then holds the only reference to the states, and drops each
    one when used.
    """
    sizes = [ctx.streams, len(ctx.snapshot.parameters), ctx.kept_inputs]
    it = iter(ctx.saved_tensors)
    ctx.maybe_clear_saved_tensors()  # does nothing under retain_graph=True
    outputs, parameters, given = (tuple(next(it) for _ in range(n)) for n in sizes)
    return outputs, parameters, given, _unpack(ctx.tape_layout, tuple(it))


class _Backward:
    """One backward pass: time steps last to first."""

    def __init__(
        self,
        program: Program,
        snapshot: Snapshot,
        tape: Tape,
        gradients: ChainGradients,
        given: list[Streams | None],
        *,
        inputs_wanted: bool,
        entry_wanted: bool,
    ) -> None:
        self.program = program
        self.snapshot = snapshot
        self.tape = tape
        self.gradients = gradients
        self.given = given
        self.inputs_wanted = inputs_wanted
        self.entry_wanted = entry_wanted

    def run(self, outputs: Streams, grads: Grads) -> list[Tensor | None]:
        """Gradients of the given inputs in their order, if wanted; all others end up in `self.gradients`."""
        input_grads: list[Grads] = []
        feedback: Grads = ()
        untouched = [i == len(self.program.exit) for i in first_updates(self.program.exit, len(grads))]
        while self.tape.segments:
            segment = self.tape.segments.pop()  # with it goes the last reference to its states
            residue = self._recompute(segment) if self.program.keep_states_every > 1 else self.tape.residue
            for t in range(segment.last, segment.first - 1, -1):
                streams = tuple(y[t] for y in outputs)
                # Where an output is the core's own, untouched by the exit, its gradient has joined the next step's.
                own = _at(t, grads, [not (feedback and same) for same in untouched])
                # Where it touches none, its outputs are as many as the core's streams; else there is nothing to join.
                earlier = _at(t - 1, grads, untouched) if any(untouched) and not self.program.fed[t] else ()
                feedback = self._step(t, streams, own, feedback, earlier, residue)
                if self.program.fed[t]:
                    if self.inputs_wanted:
                        input_grads.append(feedback)
                    feedback = ()
            if residue is not None:
                residue.check_undone_to(segment.residue)
        return [g for grads in reversed(input_grads) for g in grads]

    def _step(
        self, t: int, streams: Streams, grads: Grads, feedback: Grads, earlier: Grads, residue: Residue | None
    ) -> Grads:
        """One time step backwards: from the gradients of its output to those of its input.

        Args:
            t: The time step.
            streams: Its outputs.
            grads: Gradients with respect to them.
            feedback: Gradients of the core's output that come from the next step.
            earlier: Gradients of the core's input that come from the output of the step before.
            residue: None in float arithmetic.
        """
        streams, grads = self._rewind(t, 2, streams, grads, None, feedback)
        streams, grads = self._rewind(t, 1, streams, grads, residue, earlier)
        self._compare(streams, self.tape.fingerprints[t, 1])
        if self.program.fed[t] and self.program.entry and self.entry_wanted:
            streams, grads = self._rewind(t, 0, streams, grads, None)
            self._compare(streams, self.tape.fingerprints[t, 0])
        return grads

    def _rewind(
        self, t: int, part: int, streams: Streams, grads: Grads, residue: Residue | None, joining: Grads = ()
    ) -> tuple[Streams, Grads]:
        links = (self.program.entry, self.program.core, self.program.exit)[part]
        if self.program.exact and residue is None:
            residue = Residue()
        around = self.program.around(t, part, self.snapshot.replaying)
        reads = self.tape.read.pop((t, part), [])
        into, indices_of = self.gradients, self.snapshot.indices_of
        return rewind_chain(links, streams, grads, reads, residue, around, indices_of, into, joining)

    def _recompute(self, segment: Segment) -> Residue | None:
        """Run a segment again from its start, this time keeping the states that are read."""
        residue = segment.residue.clone() if segment.residue is not None else None
        features, state = segment.features, segment.state
        with torch.no_grad():
            for t in range(segment.first, segment.last + 1):
                entered = self.given[t]
                if entered is not None:
                    entered = self.program.enter(entered, residue)

                def keep(part: int, read: Read, t: int = t) -> None:
                    if part == 1:
                        self.tape.read.setdefault((t, 1), []).append(read)

                features, state = self.program.run_core(
                    t, entered, features, state, residue, self.snapshot.replaying, keep
                )
        if residue is not None:
            residue.check_range()
        return residue

    def _compare(self, streams: Streams, expected: Tensor) -> None:
        """Raise unless the recovered input is the input that was given."""
        found = fingerprint(streams)
        if torch.equal(found, expected) or not bool(expected.isfinite().all()):
            return
        # The weights average out: the plain sum sees the same error everywhere, the squares see a wrong scale.
        size = expected[2::3].sqrt().clamp_min(1e-30)
        weighted, plain, squares = (found - expected).abs().unflatten(0, (-1, 3)).unbind(1)
        error = float((torch.stack([weighted, plain, squares / (2 * size)]) / size).max())
        tolerance = min(_TOLERANCE.get(x.dtype, 0.0) for x in streams)
        if self.program.exact or error > tolerance or math.isnan(error):
            raise ReversibilityError(
                f"the input recovered in the backward pass differs from the one given by {error:.2g} of its size, "
                "so the gradient would be wrong: an inverse does not invert, or not precisely enough. "
                "revgrad.check_invertible(module, inputs) names the layer; arithmetic='exact' or mode='stored' avoid it"
            )


def _at(t: int, grads: Grads, wanted: list[bool]) -> Grads:
    """The wanted gradients of one time step, None for the others."""
    return tuple(g[t] if g is not None and w else None for g, w in zip(grads, wanted, strict=True))


def _group(program: Program, per_step: int, tensors: tuple[Tensor, ...]) -> list[Streams | None]:
    """The given inputs by time step."""
    it = iter(tensors)
    if not tensors:
        return [None] * program.steps
    return [tuple(next(it) for _ in range(per_step)) if fed else None for fed in program.fed]


@dataclass
class _Slot:
    """Stands for the tensor of this number."""

    index: int


@dataclass
class _PackedResidue:
    layout: Any
    slots: list[_Slot]


def _map(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a function to all that is neither a container nor a plain value in the fields of a tape."""
    if isinstance(tree, ChainState):
        return ChainState(*(_map(x, change) for x in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map(x, change) for x in tree)
    if isinstance(tree, dict):
        return {k: _map(v, change) for k, v in tree.items()}
    if isinstance(tree, (Segment, Read)):
        return type(tree)(*(_map(getattr(tree, f.name), change) for f in fields(tree)))
    return change(tree)


def _pack(tape: Tape) -> tuple[Tape, list[Tensor]]:
    """Take the tensors out of a tape: what is left goes on the context, the tensors into `save_for_backward`."""
    tensors: list[Tensor] = []

    # Not recursive: a function that refers to itself is a reference cycle, which would hold the tensors until the
    # collector runs.
    def slot(x: Tensor) -> _Slot:
        tensors.append(x)
        return _Slot(len(tensors) - 1)

    def out(item: Any) -> Any:
        if isinstance(item, Residue):
            return _PackedResidue(item.layout(), [slot(x) for x in item.tensors()])
        return slot(item) if isinstance(item, Tensor) else item

    return _map_tape(tape, out), tensors


def _unpack(layout: Tape, tensors: tuple[Tensor, ...]) -> Tape:
    """Put the tensors back into a new tape; the layout stays as it is, for a second backward pass."""

    def back(item: Any) -> Any:
        if isinstance(item, _PackedResidue):
            return Residue.unpack(item.layout, [tensors[x.index] for x in item.slots])
        return tensors[item.index] if isinstance(item, _Slot) else item

    return _map_tape(layout, back)


def _map_tape(tape: Tape, change: Callable[[Any], Any]) -> Tape:
    return Tape(_map(tape.segments, change), _map(tape.read, change), _map(tape.residue, change), tape.fingerprints)


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Autocast must not cache casts of weights made here without a graph: stored layers in the same region would use
    them.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
