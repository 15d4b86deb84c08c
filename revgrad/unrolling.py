"""Running a chain over time in one of three ways: `stored`, `checkpoint` or `reversible`. Same weights, same results,
different memory.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from revgrad.arithmetic import forgets
from revgrad.chain import ChainState, Link
from revgrad.checkpointed import run_steps_checkpointed
from revgrad.errors import StreamError
from revgrad.function import run_reversible
from revgrad.layer import NO_ARGUMENTS, Arguments, ReversibleLayer, Streams, unwrapped
from revgrad.links import (
    Arithmetic,
    Chain,
    Mode,
    check_mode,
    check_offload,
    checked_state,
    checked_streams,
)
from revgrad.program import Program, stack
from revgrad.residue import Residue
from revgrad.sequential import ReversibleSequential
from revgrad.tracing import recomputing


def unroll(
    core: Chain,
    inputs: Sequence[Tensor | Streams | None],
    state: ChainState | None = None,
    *,
    entry: Chain = (),
    exit: Chain = (),  # noqa: A002
    mode: Mode = "reversible",
    arithmetic: Arithmetic = "auto",
    keep_states_every: int | Literal["sqrt"] = 1,
    conditioning: Arguments = NO_ARGUMENTS,
    anchor_every: int | None = None,
    drift_guard: bool | int = False,
    offload: bool = False,
) -> tuple[Streams, ChainState]:
    """Run a reversible recurrent chain over time: `y_t = exit(core(entry(x_t), s_(t-1)))`.

    Args:
        core: The layers that have states. The state that they leave at one time step they read at the next. Where it
            is a chain with options of its own, the same are to be passed here; those of entry and exit do not count.
        inputs: Per time step the input streams (one tensor, or a tuple), or None to go on from the core's own output
            of the step before, without exit and entry (CrevNet, section 2.1: the exit undoes the entry).
        state: The first step's conditioning state; required if a layer is stateful.
        entry: Layers applied to a given input.
        exit: Layers applied to the core's output; normally the inverse of the entry.
        mode: `stored` keeps every activation, `checkpoint` recomputes each time step from its input, `reversible`
            recomputes from the outputs and keeps only outputs, states and residue.
        arithmetic: `exact` carries the streams on a fixed-point grid, where inverses are exact bit for bit; `float`
            as they come; `auto` is the core's own arithmetic, if it is a chain that has been given one, and else exact
            if a coupling forgets (gated, momentum, or with an inverted cell): its float inverse is ill-conditioned.
        keep_states_every: In reversible mode, keep the states of every n-th time step only and recompute the others, at
            one more forward pass of entry and core. `sqrt` is the root of the number of time steps, so that what is
            kept grows as the root.
        conditioning: Arguments for every transform of entry, core and exit that takes them, the same at every step; as
            in `ReversibleSequential`.
        anchor_every: In reversible mode, also keep the streams in front of every n-th layer of the core, at every time
            step, for the recovering to go on from.
        drift_guard: In reversible mode, compare the recovered input of every layer of the core, so that an error names
            the first one that cannot be recovered. A number of first passes is that of the core, a chain which counts
            them.
        offload: In reversible mode, whether states and anchors wait in host memory between forward and backward pass,
            where the chain runs on CUDA. Elsewhere nothing changes.

    Returns:
        One tensor per output stream, `[T, ...]` with time first, and the final state.

    Raises:
        StreamError: An option of the core that is not passed to `unroll` as well, no input at the first step, unknown
            mode, wrong number of streams or states, conditioning that no layer takes.
    """
    arithmetic = _agreed_with_core(
        core,
        mode=mode,
        arithmetic=arithmetic,
        anchor_every=anchor_every,
        drift_guard=drift_guard,
        offload=offload,
    )
    given = [x if x is None else checked_streams("unroll", (x,) if isinstance(x, Tensor) else x) for x in inputs]
    if not given or given[0] is None:
        raise StreamError("unroll: the first time step must be given an input")
    widths = {len(streams) for streams in given if streams is not None}
    if len(widths) > 1:
        raise StreamError(
            f"unroll: the inputs of different time steps have different numbers of streams: {sorted(widths)}"
        )
    program = Program.of_parts(
        entry,
        core,
        exit,
        fed=tuple(x is not None for x in given),
        arithmetic=arithmetic,
        conditioning=conditioning,
        keep_states_every=_segment_length(keep_states_every, len(given)),
        anchor_every=anchor_every,
        offload=offload,
    )
    _check_ends((*program.entry, *program.exit), program.exact)
    state = program.enter_state(checked_state(program.core, state))
    check_offload(offload, mode)
    if mode == "reversible" and recomputing() and program.wants_gradients(given, state):
        program = replace(program, guarded=_is_guarded(core, drift_guard))
        return run_reversible(program, given, state, stacked=True)
    if mode == "checkpoint" and recomputing():
        return run_steps_checkpointed(program, given, state)
    check_mode(mode)
    return _run_stored(program, given, state)


def _agreed_with_core(core: Chain, arithmetic: Arithmetic, **given: Any) -> Arithmetic:
    """The arithmetic, which may be the core's own.

    Raises:
        StreamError: The core has been given an option that `unroll` has been given otherwise, or does not have.
    """
    core, _ = unwrapped(core)
    own = core.chosen_options() if isinstance(core, ReversibleLayer) else {}
    if not isinstance(given["drift_guard"], bool) and "drift_guard" not in own:
        raise StreamError(
            f"unroll: drift_guard must be True or False, got {given['drift_guard']!r}: first passes are counted by the "
            "core, so make it a ReversibleSequential with drift_guard=n and pass the same"
        )
    if arithmetic == "auto":
        arithmetic = own.get("arithmetic", arithmetic)
    given["arithmetic"] = arithmetic
    for name, value in own.items():
        if value == given.get(name):
            continue
        same = f"pass the same to unroll, {name}={value!r}, or"
        fix = same if name in given else "unroll has no such option;"
        raise StreamError(
            f"unroll: the core is a chain with {name}={value!r}, which would be ignored: {fix} take it off the core"
        )
    return arithmetic


def _is_guarded(core: Chain, drift_guard: bool | int) -> bool:
    """Whether a drift guard watches the pass that begins; a number of first passes the core counts."""
    if isinstance(drift_guard, bool):
        return drift_guard
    chain, _ = unwrapped(core)
    return isinstance(chain, ReversibleSequential) and chain.count_pass()


def _segment_length(every: int | str, steps: int) -> int:
    """Time steps between states that are kept; `sqrt` leaves as many segments as there are steps in each."""
    if every == "sqrt":
        return round(math.sqrt(steps))
    if isinstance(every, str):
        raise StreamError(f"unroll: keep_states_every must be a whole number or 'sqrt', got {every!r}")
    return every


def _run_stored(program: Program, given: list[Streams | None], state: ChainState) -> tuple[Streams, ChainState]:
    """All time steps under ordinary autograd; also the way without gradients."""
    residue = Residue(keep=False) if program.exact else None
    features: Streams = ()
    outputs: list[Streams] = []
    for t, streams in enumerate(given):
        entered = None if streams is None else program.enter(streams, residue)
        features, state = program.run_core(t, entered, features, state, residue)
        outputs.append(program.run_exit(t, features, residue))
    if residue is not None:
        residue.check_range()
    return stack(outputs), state


def _check_ends(links: Iterable[Link], exact: bool) -> None:
    """Entry and exit have neither states nor a residue of their own."""
    for name, layer in links:
        if layer.stateful:
            raise StreamError(f"unroll: {name} of entry or exit is stateful; only the core has states")
        if exact and forgets(layer):
            raise StreamError(
                f"unroll: {name} of entry or exit forgets (it is gated or has a momentum), which exact arithmetic can "
                "undo in the core only"
            )
