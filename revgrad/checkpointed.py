"""A program under `torch.utils.checkpoint`: every time step, or every layer, keeps its input and is run again."""

from collections.abc import Callable
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

        def run(
            residue: Residue | None, streams: Streams | None, features: Streams, state: ChainState, t: int = t
        ) -> tuple[Streams, Streams, ChainState]:
            entered = None if streams is None else program.enter(streams, residue)
            features, state = program.run_core(t, entered, features, state, residue)
            return program.run_exit(t, features, residue), features, state

        (out, features, state), residue = _checkpointed(snapshot, run, residue, streams, features, state)
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

        def run(
            residue: Residue | None, streams: Streams, state: ChainState, program: Program = program
        ) -> tuple[Streams, ChainState]:
            return program.run_core(0, streams, (), state, residue)

        (streams, new_state), residue = _checkpointed(
            Snapshot([link.layer]), run, residue, streams, ChainState((layer_state,), carry)
        )
        own.append(new_state.layers[0])
        carry = new_state.carry
    return streams, ChainState(tuple(own), carry)


def _checkpointed(
    snapshot: Snapshot, run: Callable[..., Any], residue: Residue | None, *inputs: Any
) -> tuple[Any, Residue | None]:
    """`run(residue, *inputs)` under `torch.utils.checkpoint`, and the residue after it. Every evaluation adds to a copy
    of the residue, which is as it was for the next one."""

    def evaluate(*inputs: Any) -> tuple[Any, Residue | None]:
        own = residue.clone(words=False, keep=False) if residue is not None else None
        results = run(own, *inputs)
        if own is not None:
            own.check_range()
        return results, own

    return checkpoint(evaluate, *inputs, use_reentrant=False, context_fn=snapshot.checkpoint_contexts)
