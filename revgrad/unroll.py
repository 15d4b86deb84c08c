"""Running a program in one of three ways: `stored`, `checkpoint` or `reversible`. Same weights, same results, different
memory.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revgrad.arithmetic import forgets, is_exact
from revgrad.chain import ChainState, Link, stateless
from revgrad.conditioning import bind
from revgrad.errors import StreamError
from revgrad.function import run_reversible
from revgrad.layer import NO_ARGUMENTS, Arguments, Inverse, ReversibleLayer, Streams
from revgrad.program import PartArguments, Program, stack
from revgrad.replay import Snapshot
from revgrad.residue import Residue
from revgrad.tracing import recomputing

Mode = Literal["stored", "checkpoint", "reversible"]
Arithmetic = Literal["auto", "exact", "float"]
Chain = ReversibleLayer | Iterable[ReversibleLayer]


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
            of the step before, without exit and entry (section 2.1: the exit undoes the entry).
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
    links = [chain_links(part) for part in (entry, core, exit)]
    arithmetic = _agreed(
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
    everything = sum(links, ())
    bound = bind(everything, conditioning)
    first, last = len(links[0]), len(links[0]) + len(links[1])
    program = Program(
        entry=links[0],
        core=links[1],
        exit=links[2],
        fed=tuple(x is not None for x in given),
        exact=is_exact(arithmetic, everything),
        keep_states_every=_segment_length(keep_states_every, len(given)),
        arguments=PartArguments(bound[:first], bound[first:last], bound[last:]),
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
        return _run_checkpointed(program, given, state)
    check_mode(mode)
    return run_stored(program, given, state, Residue(keep=False) if program.exact else None)


def _agreed(core: Chain, arithmetic: Arithmetic, **given: Any) -> Arithmetic:
    """The arithmetic, which may be the core's own.

    Raises:
        StreamError: The core has been given an option that `unroll` has been given otherwise, or does not have.
    """
    core = _chain_of(core)
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


def _chain_of(core: Chain) -> Chain:
    """The core, or what it is the inverse of."""
    while isinstance(core, Inverse):
        core = core.layer
    return core


def _is_guarded(core: Chain, drift_guard: bool | int) -> bool:
    """Whether a drift guard watches the pass that begins; a number of first passes the core counts."""
    if isinstance(drift_guard, bool):
        return drift_guard
    chain = _chain_of(core)
    return isinstance(chain, ReversibleLayer) and chain.is_guarded()


def _segment_length(every: int | str, steps: int) -> int:
    """Time steps between states that are kept; `sqrt` leaves as many segments as there are steps in each."""
    if every == "sqrt":
        return round(math.sqrt(steps))
    if isinstance(every, str):
        raise StreamError(f"unroll: keep_states_every must be a whole number or 'sqrt', got {every!r}")
    return every


def run_stored(
    program: Program, given: list[Streams | None], state: ChainState, residue: Residue | None
) -> tuple[Streams, ChainState]:
    """All time steps under ordinary autograd; also the way without gradients."""
    features: Streams = ()
    outputs: list[Streams] = []
    for t, streams in enumerate(given):
        entered = None if streams is None else program.enter(streams, residue)
        features, state = program.run_core(t, entered, features, state, residue)
        outputs.append(program.run_exit(t, features, residue))
    if residue is not None:
        residue.check_range()
    return stack(outputs), state


def _run_checkpointed(program: Program, given: list[Streams | None], state: ChainState) -> tuple[Streams, ChainState]:
    """Every time step under `torch.utils.checkpoint`, which keeps its input and runs it again."""
    snapshot = Snapshot(program.layers())
    residue = Residue(keep=False) if program.exact else None
    features: Streams = ()
    outputs: list[Streams] = []
    for t, streams in enumerate(given):
        start = residue.clone(words=False) if residue is not None else None

        def run(streams: Streams | None, features: Streams, state: ChainState, t: int = t, start: Any = start) -> Any:
            local = start.clone(words=False) if start is not None else None
            entered = None if streams is None else program.enter(streams, local)
            features, state = program.run_core(t, entered, features, state, local)
            outputs = program.run_exit(t, features, local)
            if local is not None:
                local.check_range()
            return outputs, features, state, local

        out, features, state, residue = checkpoint(
            run, streams, features, state, use_reentrant=False, context_fn=snapshot.checkpoint_contexts
        )
        outputs.append(out)
    return stack(outputs), state


def run_layers_checkpointed(whole: Program, streams: Streams, state: ChainState) -> tuple[Streams, ChainState]:
    """A program's core under `torch.utils.checkpoint`, layer by layer."""
    residue = Residue(keep=False) if whole.exact else None
    own: list[Any] = []
    carry = state.carry
    streams = whole.enter(streams, residue)
    if residue is not None:
        residue.check_range()
    for i, (link, layer_state) in enumerate(zip(whole.core, state.layers, strict=True)):
        program = Program.of_chain((link,), exact=whole.exact, arguments=whole.arguments.core[i : i + 1])
        snapshot = Snapshot([link.layer])
        start = residue.clone(words=False) if residue is not None else None

        def run(streams: Streams, state: ChainState, program: Program = program, start: Any = start) -> Any:
            local = start.clone(words=False) if start is not None else None
            streams, state = program.run_core(0, streams, (), state, local)
            if local is not None:
                local.check_range()
            return streams, state, local

        streams, new_state, residue = checkpoint(
            run,
            streams,
            ChainState((layer_state,), carry),
            use_reentrant=False,
            context_fn=snapshot.checkpoint_contexts,
        )
        own.append(new_state.layers[0])
        carry = new_state.carry
    return streams, ChainState(tuple(own), carry)


def chain_links(chain: Chain, prefix: str = "", outermost: ReversibleLayer | None = None) -> tuple[Link, ...]:
    """Flatten layers, sequences of layers and inverses of sequences into links with names for errors.

    Args:
        chain: What to flatten.
        prefix: Its place in the outermost chain; empty for that itself.
        outermost: That chain, where it has options.

    Raises:
        StreamError: Something in it is no reversible layer; or a chain in it has options that are not the outermost's.
    """
    if isinstance(chain, Inverse) and isinstance(chain.layer, Inverse):
        return chain_links(chain.layer.layer, prefix, outermost)
    if isinstance(chain, Inverse) and is_sequence(chain.layer):
        inner = chain_links(chain.layer, prefix, outermost)
        return tuple(Link(f"inverse of {name}", Inverse(layer)) for name, layer in reversed(inner))
    if isinstance(chain, ReversibleLayer) and not is_sequence(chain):
        return (Link(f"layer {prefix or '0'} ({describe(chain)})", chain),)
    if not isinstance(chain, Iterable):
        raise StreamError(f"a {type(chain).__name__} is no chain of reversible layers: {_advice(chain, chain)}")
    if isinstance(chain, ReversibleLayer):
        if not prefix:
            outermost = chain
        elif outermost is not None:
            _check_options(chain, prefix, outermost)
    links: list[Link] = []
    for i, layer in enumerate(chain):
        if not isinstance(layer, ReversibleLayer):
            raise StreamError(
                f"layer {prefix}{i} is a {type(layer).__name__}, not a reversible layer: {_advice(chain, layer)}"
            )
        links += chain_links(layer, f"{prefix}.{i}" if prefix else f"{i}", outermost)
    return tuple(links)


def _check_options(chain: ReversibleLayer, place: str, outermost: ReversibleLayer) -> None:
    """Raise for options of a chain inside another that would be ignored."""
    for name, value in chain.chosen_options().items():
        if getattr(outermost, name, None) != value:
            raise StreamError(
                f"layer {place} is a chain with {name}={value!r}, which would be ignored, since the outermost chain's "
                "options count: set it there, or take it off this one"
            )


def _advice(chain: Any, wrong: Any) -> str:
    """What to do about something that is no reversible layer.

    Args:
        chain: What was given.
        wrong: The item of it that is none, or itself.
    """
    if isinstance(chain, nn.Module):
        inside = [name for name, m in chain.named_modules() if isinstance(m, ReversibleLayer) and is_sequence(m)]
        if inside:
            return f"pass the chain that is inside, .{inside[0]}, and the streams that it is given"
    layers = list(wrong) if isinstance(wrong, Iterable) else []
    if layers and all(isinstance(x, ReversibleLayer) for x in layers):
        return "unpack it, ReversibleSequential(*layers)"
    return "put it inside a coupling, AdditiveCoupling(module), or give residual blocks to momentum_from"


def is_sequence(layer: Any) -> bool:
    """Whether a layer is itself a chain of layers."""
    return isinstance(layer, nn.Module) and hasattr(layer, "__iter__")


def describe(layer: ReversibleLayer) -> str:
    """A layer's class, through inverses."""
    return f"Inverse({describe(layer.layer)})" if isinstance(layer, Inverse) else type(layer).__name__


def check_mode(mode: str) -> None:
    """Raise for an unknown mode."""
    if mode not in ("stored", "checkpoint", "reversible"):
        raise StreamError(f"mode must be 'stored', 'checkpoint' or 'reversible', got {mode!r}")


def check_offload(offload: bool, mode: str) -> None:
    """Raise for a mode whose activations autograd keeps."""
    if offload and mode != "reversible":
        raise StreamError(
            f"offload=True goes with mode='reversible', not {mode!r}: what autograd keeps itself can be moved by "
            "torch.autograd.graph.save_on_cpu(pin_memory=True)"
        )


def checked_streams(what: str, streams: Iterable[Any]) -> Streams:
    """The streams as a tuple.

    Raises:
        StreamError: There are none, or one is not a tensor.
    """
    streams = tuple(streams)
    wrong = [type(x).__name__ for x in streams if not isinstance(x, Tensor)]
    if wrong or not streams:
        found = f"a {wrong[0]}" if wrong else "none"
        raise StreamError(f"{what}: the streams must be tensors, at least one; got {found}")
    return streams


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


def checked_state(links: tuple[Link, ...], state: ChainState | None) -> ChainState:
    """The state, or an empty one for a chain without states.

    Raises:
        StreamError: A stateful layer has no state, or the number of states is wrong, or they are no ChainState.
    """
    if state is None:
        state = stateless(links)
    if not isinstance(state, ChainState):
        raise StreamError(f"the states must be a ChainState, got a {type(state).__name__}: {_form(links)}")
    if len(state.layers) != len(links):
        raise StreamError(
            f"the chain has {len(links)} layers, but the state has {len(state.layers)} entries: {_form(links)}, with "
            "() for a stateless layer"
        )
    for (name, layer), own in zip(links, state.layers, strict=True):
        if not (isinstance(own, (tuple, list)) and all(isinstance(x, Tensor) for x in own)):
            raise StreamError(
                f"{name}: its state must be a tuple of tensors, got a {type(own).__name__}: {_form(links)}"
            )
        if layer.stateful and not own and not state.carry:
            raise StreamError(f"{name} is stateful, but no state was given for it: states={_form(links)}")
        if not layer.stateful and own:
            raise StreamError(f"{name} takes no state, but {len(own)} tensor(s) were given for it")
    return state


def _form(links: tuple[Link, ...]) -> str:
    """What the state of a chain looks like, for errors."""
    own = ["(h,)" if layer.stateful else "()" for _, layer in links]
    shown = own if len(own) <= 4 else [*own[:3], "..."]
    return f"ChainState(({', '.join(shown)}{',' if len(own) == 1 else ''}))"
