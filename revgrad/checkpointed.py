"""A program under `torch.utils.checkpoint`: every time step, or every layer, keeps its input and is run again."""

from typing import Any

from torch.utils.checkpoint import checkpoint

from revgrad.chain import ChainState
from revgrad.layer import Streams
from revgrad.program import Program, stack
from revgrad.replay import Snapshot
from revgrad.residue import Residue
from revgrad.tracing import untraced


@untraced
def run_steps_checkpointed(
    program: Program, given: list[Streams | None], state: ChainState
) -> tuple[Streams, ChainState]:
    """Every time step under `torch.utils.checkpoint`, which keeps its input and runs it again."""
    snapshot = Snapshot(program.layers())
    residue = Residue(keep=False) if program.exact else None
    features: Streams = ()
    outputs: list[Streams] = []
    for t, streams in enumerate(given):
        start = residue.clone(words=False, keep=False) if residue is not None else None

        def run(streams: Streams | None, features: Streams, state: ChainState, t: int = t, start: Any = start) -> Any:
            local = start.clone(words=False, keep=False) if start is not None else None
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


@untraced
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
        start = residue.clone(words=False, keep=False) if residue is not None else None

        def run(streams: Streams, state: ChainState, program: Program = program, start: Any = start) -> Any:
            local = start.clone(words=False, keep=False) if start is not None else None
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
