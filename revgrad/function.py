"""The autograd Functions: a whole program with nothing stored but outputs, conditioning states and residue.

Forward, per time step t: `f_t = core(entry(x_t) or f_(t-1), s_(t-1))`, `y_t = exit(f_t)`, all without a graph.
Backward, last step first: every layer is undone from its output and differentiated in the same evaluation of its
transform.

In the graph a program is a row of nodes, tied together by a token, which is a tensor without elements:

    inputs, states, parameters -> _Inputs -> _Parameters -> ... -> _Parameters -> _Outputs -> streams, states

In the backward pass `_Outputs` prepares the walk and hands it on with the token's gradient, so that the gradients that
came in are held by the walk alone; `_Inputs` completes it. A `_Parameters` node goes as far as a layer and releases
the gradients of parameters of this and later ones that no earlier layer has. Only parameters whose `.grad` exists take
that way: added to it at once, they need no memory of their own. The others wait in `_Inputs` until the recovered input
has been compared with the one that was given; a backward pass that fails leaves an empty `.grad` empty.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revgrad import fused_optimisers
from revgrad.backward import BackwardPass
from revgrad.chain import ChainGradients, ChainState, cells_of
from revgrad.checks import current_checks, in_force
from revgrad.conditioning import conditioning_changed
from revgrad.errors import ReversibilityError, StreamError
from revgrad.fingerprint import fingerprint
from revgrad.gradients import check_closed, filled_for_hooks
from revgrad.graphless import graphless
from revgrad.in_place import Unchanged, explained
from revgrad.layer import Grads, StreamGrads, Streams
from revgrad.offload import keeper_for
from revgrad.program import CORE, ENTRY, EXIT, Part, Program, flat
from revgrad.replay import Snapshot
from revgrad.residue import Residue
from revgrad.second_order import DifferentiableGradients
from revgrad.tape import Segment, Tape, pack, unpack
from revgrad.threads import Use
from revgrad.tracing import check_surroundings, refuse_inference_mode, untraced


class _Run(NamedTuple):
    """One run of a program, in one argument: the inputs in it are those of `_Inputs`, and not of `_Outputs`."""

    program: Program
    snapshot: Snapshot
    given: list[Streams | None]
    state: ChainState
    stacked: bool
    residue: Residue | None


@untraced
def run_reversible(
    program: Program,
    given: list[Streams | None],
    state: ChainState,
    *,
    stacked: bool,
    residue: Residue | None = None,
) -> tuple[Streams, ChainState]:
    """Run a program whose backward pass recomputes it.

    Args:
        program: What to run.
        given: Per time step the input streams, or None.
        state: The state that the first step reads.
        stacked: Whether to return one tensor per stream, time first, instead of the streams of the only step.
        residue: In exact arithmetic, for a program that goes on where another one ends: its reservoirs, which become
            those behind this program. What the program itself needs to be undone it keeps.

    Returns:
        The output streams and the final state.
    """
    fused_optimisers.watch_fused_optimisers()
    snapshot = Snapshot(program.layers())
    inputs = flat(given)
    stages, late = _order_of_release(program, snapshot, sum(x.nbytes for x in inputs) // _PORTIONS)
    checks = current_checks()
    check_surroundings(snapshot.modules, inputs[0].device, may_wait=checks.may_wait)
    if program.offload and not checks.may_wait:
        raise ReversibilityError(
            "offload=True waits for copies to the host, where checks are deferred: choose offload=False"
        )
    conditioning = program.conditioning()
    held = [*(snapshot.parameters[i] for i in late), *conditioning]
    late += range(len(snapshot.parameters), len(snapshot.parameters) + len(conditioning))
    token = _Inputs.apply(len(inputs), late, *inputs, *state.tensors(), *held)
    for application, indices in stages:
        lowest = application == stages[0][0]
        token = _Parameters.apply(application, indices, lowest, token, *(snapshot.parameters[i] for i in indices))
    results = _Outputs.apply(_Run(program, snapshot, given, state, stacked, residue), token)
    snapshot.renew_weights()
    n = len(results) - len(state.tensors())
    return results[:n], state.replace(results[n:])


_PORTIONS = 16
"""Gradients wait for others until they take this fraction of the inputs' memory: every node takes time."""


def _order_of_release(
    program: Program, snapshot: Snapshot, portion: int
) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """Which parameters are released after which application of a layer at the first time step, in forward order, and
    which of them wait for the end.

    Args:
        program: What is run.
        snapshot: Has the parameters.
        portion: Bytes from which on gradients are released, rather than wait for those of an earlier layer.
    """
    stages: list[tuple[int, list[int]]] = []
    late: list[int] = []
    seen: set[int] = set()
    room = 0
    for part, links in zip(Part, program.parts, strict=True):
        for position, (_, layer) in enumerate(links):
            full = room <= 0
            for i in snapshot.indices_of(layer):
                parameter = snapshot.parameters[i]
                if i in seen or not parameter.requires_grad:
                    continue
                seen.add(i)
                if not (parameter.is_leaf and parameter.grad is not None):
                    late.append(i)
                    continue
                if full:
                    stages.append((program.application(0, part, position), []))
                    room, full = portion, False
                stages[-1][1].append(i)
                room -= parameter.nbytes
    return stages, late


class _Inputs(torch.autograd.Function):
    """Inputs, initial state, late parameters and conditioning; last in the backward pass, which it completes."""

    @staticmethod
    def forward(ctx: Any, inputs: int, late: list[int], *tensors: Tensor) -> Tensor:
        ctx.inputs, ctx.late = inputs, late
        return torch.empty(0, device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, token: Any) -> tuple[Any, ...]:
        progress = token.progress
        progress.to_the_end()
        input_grads = progress.input_grads() or (None,) * ctx.inputs
        grads = (*input_grads, *progress.state_grads(), *progress.take(ctx.late))
        return None, None, *filled_for_hooks(grads, ctx.next_functions)


class _Parameters(torch.autograd.Function):
    """The parameters that are complete when one application of a layer has been rewound."""

    @staticmethod
    def forward(
        ctx: Any, application: int, indices: list[int], lowest: bool, token: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.application, ctx.indices, ctx.lowest = application, indices, lowest
        return torch.empty(0, device=token.device)

    @staticmethod
    def backward(ctx: Any, token: Any) -> tuple[Any, ...]:
        before = ctx.next_functions[0][0]
        # What recovers the wrong input must raise, also where autograd is asked for late parameters alone.
        if ctx.lowest or before is None or not torch._C._will_engine_execute_node(before):
            token.progress.to_the_end()
        else:
            token.progress.to(ctx.application)
        return None, None, None, token, *filled_for_hooks(token.progress.take(ctx.indices), ctx.next_functions[1:])


class _Outputs(torch.autograd.Function):
    """Runs the program. Outputs: one tensor per stream, time first where stacked, then the final state.

    Saved with `save_for_backward`, so that autograd notices when they are changed in place: the outputs (all
    activations are recovered from them), the states that were read and cannot be recovered, the parameters and
    conditioning tensors (no copies), the given inputs where states are recomputed (no copies), and the residue. Random
    states and flags are kept in the snapshot.
    """

    @staticmethod
    def forward(ctx: Any, run: _Run, token: Tensor) -> Any:
        program, snapshot, given, state, stacked, _ = run
        conditioning = program.conditioning()
        use = Use(snapshot.module_set, exclusive=False)
        with use, graphless(), snapshot.mending, Unchanged(conditioning, conditioning_changed):
            outputs, final, tape = _forward(run)
        if list(map(id, program.conditioning())) != list(map(id, conditioning)):
            raise StreamError(
                "a transform has put a tensor into a list or dictionary that it is given as conditioning, or taken one "
                "out: the recomputation in backward would find another one than the forward pass; return what is to be "
                "kept, as part of a state or in a stream, or choose mode='stored'"
            )
        inputs = flat(given)
        storages = {x.untyped_storage()._cdata for x in inputs}
        # A stream that no layer has touched would otherwise alias the caller's tensor.
        outputs = tuple(x.clone() if x.untyped_storage()._cdata in storages else x for x in outputs)
        parameters = (*snapshot.parameters, *conditioning)
        theirs = {id(x) for x in (*inputs, *state.tensors(), *parameters)}
        handed_on = tuple(x.clone() if id(x) in theirs else x for x in final.tensors())
        ctx.set_materialize_grads(False)
        ctx.program, ctx.snapshot, ctx.stacked, ctx.device = program.emptied(), snapshot, stacked, token.device
        ctx.layout = ChainState(tuple((None,) * len(own) for own in state.layers), (None,) * len(state.carry))  # type: ignore[arg-type, misc]
        ctx.inputs_wanted = any(x.requires_grad for x in inputs)
        kept_inputs = inputs if program.keep_states_every > 1 else []
        ctx.tape, kept = pack(tape)
        ctx.saved = (len(outputs), len(parameters), len(kept_inputs))
        ctx.save_for_backward(*outputs, *parameters, *kept_inputs, *kept)
        return (*outputs, *handed_on)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        refuse_inference_mode()
        ctx.snapshot.check_attributes("since the forward pass")
        with explained():
            outputs, parameters, given, tape = _unsave(ctx)
        gradients = ChainGradients(
            [_stand_in(p) for p in parameters],
            len(ctx.program.core),
            len(ctx.layout.carry),
        )
        final = ctx.layout.replace(grads[len(outputs) :])
        gradients.states, gradients.carry = list(final.layers), final.carry
        walk = BackwardPass(
            ctx.program.filled(gradients.parameters[len(ctx.snapshot.parameters) :]),
            ctx.snapshot,
            tape,
            StreamGrads(list(outputs), list(grads[: len(outputs)])),
            ctx.stacked,
            gradients,
            _by_step(ctx.program, given),
            inputs_wanted=ctx.inputs_wanted,
        )
        token = torch.empty(0, device=ctx.device)
        # On the token and on no node: there may be several backward passes through the same graph.
        if torch.is_grad_enabled():  # create_graph=True
            program = ctx.program.filled(parameters[len(ctx.snapshot.parameters) :])
            with ctx.snapshot.mending, in_force(tape.checks):
                token.progress = DifferentiableGradients(  # type: ignore[attr-defined]
                    program, ctx.snapshot, tape, outputs, grads, parameters, walk.compare, unrolled=ctx.stacked
                )
        else:
            token.progress = _Progress(walk)  # type: ignore[attr-defined]
        return None, token


class _Progress:
    """A walk and how far it has come.

    The walk itself does not know its iterator, which refers to it: nothing is left of a backward pass that fails.
    """

    def __init__(self, walk: BackwardPass) -> None:
        self._walk = walk
        self._applications = walk.rewind()
        self.take = walk.gradients.take
        self.input_grads = walk.input_grads

    def to(self, application: int) -> None:
        """Rewind as far as this application of a layer at the first time step."""
        with self._walk.snapshot.mending, in_force(self._walk.tape.checks):
            for done in self._applications:
                if done == application:
                    return

    def to_the_end(self) -> None:
        """Rewind all that is left, and check what has been recovered."""
        with self._walk.snapshot.mending, in_force(self._walk.tape.checks):
            for _ in self._applications:
                pass

    def state_grads(self) -> Grads:
        """Gradients of the initial state."""
        gradients = self._walk.gradients
        return (*(g for own in gradients.states for g in own), *gradients.carry)


def _forward(run: _Run) -> tuple[Streams, ChainState, Tape]:
    """Run all time steps without a graph, keeping what the tape needs."""
    program, snapshot, given, state, stacked, before = run
    recompute = program.keep_states_every > 1
    length = program.keep_states_every if recompute else program.steps
    device = flat(given)[0].device
    theirs = (*flat(given), *snapshot.parameters, *program.conditioning())
    tape = Tape(
        residue=Residue(keep=not recompute) if program.exact else None,
        keeper=keeper_for(program.offload, device, theirs),
    )
    if tape.residue is not None and before is not None:
        tape.residue.resume(before)
    residue = tape.residue
    features: Streams = ()
    outputs: Streams = ()
    idle = bool(program.entry) and not program.entry_wants_gradients(given)

    def first_evaluation(application: int) -> AbstractContextManager[None]:
        # Measuring beforehand has told that nothing draws random numbers.
        recorded = snapshot.first_evaluation(application, device) if tape.checks.may_wait else nullcontext()
        return _with_graph(recorded) if idle and program.is_entry(application) else recorded

    for t in range(program.steps):
        if t % length == 0:
            start = residue.clone(words=False) if residue is not None else None
            held = () if program.fed[t] else features
            tape.start(Segment(t, min(t + length, program.steps) - 1, state, held, start))
        entered = given[t]
        if entered is not None:
            entered = program.enter(entered, residue)
            if program.entry:
                tape.fingerprints[t, ENTRY, 0] = fingerprint(entered, program.exact)

        def entering(position: int, streams: Streams, t: int = t) -> None:
            if idle and position == 0:
                check_closed("the entry", streams, ())
            if position == 0 or program.guarded:
                tape.fingerprints[t, CORE, position] = fingerprint(program.recovered(position, streams), program.exact)
            if program.anchored(position):
                tape.anchor(t, position, streams)

        keep = partial(tape.keep, t, parts=(ENTRY, EXIT) if recompute else tuple(Part))
        features, state = program.run_core(t, entered, features, state, residue, first_evaluation, keep, entering)
        y = program.run_exit(t, features, residue, first_evaluation, keep)
        tape.keeper.settle()
        if not stacked:
            outputs = y
        else:
            if t == 0:
                outputs = tuple(x.new_empty((program.steps, *x.shape)) for x in y)
            for whole, part in zip(outputs, y, strict=True):
                _check_alike(t, part, whole)
                whole[t] = part
    if residue is not None:
        residue.check_range()
        if before is not None:
            before.resume(residue)
    snapshot.check_buffers()
    tape.checks.refuse_random(map(program.name_of, snapshot.drawing()))
    if recompute:
        tape.residue = None
    else:
        tape.cells = cells_of(program.core, state, program.exact)
    return outputs, state, tape


def _check_alike(t: int, part: Tensor, whole: Tensor) -> None:
    """Raise unless the output of a time step is of the shape and dtype of the first one's.

    Raises:
        StreamError: It is not.
    """
    if part.shape != whole.shape[1:] or part.dtype != whole.dtype:
        raise StreamError(
            f"the output of time step {t} is {part.dtype} of shape {tuple(part.shape)}, that of the first one "
            f"{whole.dtype} of shape {tuple(whole.shape[1:])}: give all time steps inputs of one shape and dtype"
        )


@contextmanager
def _with_graph(inner: AbstractContextManager[None]) -> Iterator[None]:
    """Around an entry that nobody wants undone: a graph begins where a transform reads a tensor that requires a
    gradient by way of a closure, which would lose it.
    """
    with inner, torch.enable_grad():
        yield


def _unsave(ctx: Any) -> tuple[Streams, Streams, Streams, Tape]:
    """Outputs, parameters, kept inputs and tape. The tape then holds the only reference to the states, and drops each
    one when used.
    """
    it = iter(ctx.saved_tensors)
    ctx.maybe_clear_saved_tensors()  # does nothing under retain_graph=True
    outputs, parameters, given = (tuple(next(it) for _ in range(n)) for n in ctx.saved)
    return outputs, parameters, given, unpack(ctx.tape, tuple(it))


def _stand_in(parameter: Tensor) -> Tensor:
    """A leaf of the same values, of the same class, that shares the attributes that somebody has given to it."""
    x = parameter.detach().requires_grad_(parameter.requires_grad)
    if type(x) is Tensor:  # and not a wrapper, which has its own
        x.__dict__ = parameter.__dict__
        if type(parameter) not in (Tensor, nn.Parameter):
            x.__class__ = type(parameter)
    return x


def _by_step(program: Program, given: Streams) -> list[Streams | None]:
    """Inputs in a row, by time step."""
    if not given:
        return [None] * program.steps
    it = iter(given)
    width = len(given) // sum(program.fed)
    return [tuple(next(it) for _ in range(width)) if fed else None for fed in program.fed]
