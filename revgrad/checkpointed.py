"""A program under `torch.utils.checkpoint`: every time step, or every layer, keeps its input and is run again."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from revgrad.attributes import Change, changes_since, undone
from revgrad.chain import ChainState
from revgrad.checks import Checks, current_checks, in_force
from revgrad.errors import ReversibilityError
from revgrad.layer import Streams
from revgrad.modules import InModes
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

    return checkpoint(evaluate, *inputs, use_reentrant=False, context_fn=partial(_contexts, snapshot))


def _contexts(snapshot: Snapshot) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`, around the forward pass and around its recomputation, which sees modes, parameters
    and attributes of the forward pass, and must not move the statistics either. It raises where weights have changed,
    which PyTorch leaves to the user.
    """
    versions: list[int] = []
    changes: list[Change] = []
    recomputing = partial(_recomputing, snapshot, versions, changes, current_checks())
    return _noting(snapshot, versions, changes), _Anew(recomputing)


@contextmanager
def _noting(snapshot: Snapshot, versions: list[int], changes: list[Change]) -> Iterator[None]:
    inner = snapshot.everything.inner
    attributes = [vars(module).copy() for module in inner]
    yield
    versions[:] = _versions(snapshot.parameters)
    changes[:] = changes_since(inner, attributes)
    snapshot.check_buffers()


def _versions(weights: list[Tensor]) -> list[int]:
    return [x._version for x in weights if not x.is_inference()]


@contextmanager
def _recomputing(snapshot: Snapshot, versions: list[int], changes: list[Change], checks: Checks) -> Iterator[None]:
    # None are noted yet where the forward pass itself takes a gradient, such as of an energy.
    if versions and _versions(snapshot.parameters) != versions:
        raise ReversibilityError(
            "a weight or buffer has changed in place between the forward pass and the recomputation of "
            "mode='checkpoint', so the gradient would be wrong: step the optimiser after the backward pass"
        )
    modes, statistics = InModes(snapshot.modules, snapshot.everything.training), snapshot.frozen_statistics()
    now = [(holder, name, holder[name]) for holder, name, _ in snapshot.slots]
    try:
        # `torch.func.functional_call` has put back its own by now.
        for holder, name, i in snapshot.slots:
            holder[name] = snapshot.parameters[i]
        with modes, statistics, undone(changes), in_force(checks):
            yield
    except BaseException:  # also one that keeps a context from being left (see `mending.py`)
        statistics.__exit__(None, None, None)
        modes.__exit__(None, None, None)
        raise
    finally:
        for holder, name, parameter in now:
            holder[name] = parameter


class _Anew(AbstractContextManager[None]):
    """A context that is made whenever it is entered: there may be several backward passes through the same graph."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(self._make())
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)
