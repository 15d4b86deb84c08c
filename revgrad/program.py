"""What is run: reversible chains, repeated over time steps, from given inputs or from what the step before produced."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from revgrad.arithmetic import is_exact
from revgrad.cell import replaced_at
from revgrad.chain import Around, ChainState, Link, Saved, cells_of, no_context, run_chain, undo_chain
from revgrad.conditioning import Placeholder, bind, distinct_leaves, replaced
from revgrad.errors import StreamError
from revgrad.gradients import is_differentiable
from revgrad.layer import NO_ARGUMENTS, Arguments, ReversibleLayer, State, Streams
from revgrad.links import Arithmetic, Chain, chain_links, check_every
from revgrad.residue import Residue, snap


class Part(IntEnum):
    """The chains of a time step, in the order in which they run."""

    ENTRY = 0
    CORE = 1
    EXIT = 2


# Inner loops use them: a name of a module is found faster than a member of an enumeration.
ENTRY, CORE, EXIT = Part

Keep = Callable[[Part, Saved], None]
"""Takes the part and what a layer of it has read."""


class PartArguments(NamedTuple):
    """Conditioning of each layer by part; a part without any is empty."""

    # By name and not by `Part`: torch.compile cannot index with a member of an enumeration.
    entry: tuple[Arguments, ...] = ()
    core: tuple[Arguments, ...] = ()
    exit: tuple[Arguments, ...] = ()


@dataclass(frozen=True)
class Program:
    """`T` time steps of `exit(core(entry(x)))`; the core has the states.

    A step that is given an input reads it through the entry; a step that is given none goes on from the core's
    output of the step before, which is what the entry would return for that step's output, since the exit undoes the
    entry (CrevNet, figure 1).
    """

    entry: tuple[Link, ...]
    core: tuple[Link, ...]
    exit: tuple[Link, ...]
    fed: tuple[bool, ...]
    """Per time step, whether it is given an input."""
    exact: bool
    keep_states_every: int = 1
    """States are kept at every n-th step and recomputed in between."""
    arguments: PartArguments = field(default_factory=PartArguments)
    """Conditioning."""
    anchor_every: int | None = None
    """The input of every n-th layer of the core is kept, where what has been recovered is replaced by it."""
    guarded: bool = False
    """Whether the recovered input of every layer of the core is compared with the one of the forward pass."""
    on_grid: bool = False
    """Whether given inputs are on the grid already, where exact."""
    offload: bool = False
    """Whether states and anchors wait on the host for the backward pass."""

    @classmethod
    def of_chain(
        cls,
        links: tuple[Link, ...],
        *,
        exact: bool,
        arguments: tuple[Arguments, ...] = (),
        anchor_every: int | None = None,
        guarded: bool = False,
        offload: bool = False,
    ) -> "Program":
        """One time step of a chain, without entry and exit; `arguments` are those of its layers.

        Raises:
            StreamError: `anchor_every` is not a whole number from 1 on.
        """
        return cls(
            entry=(),
            core=links,
            exit=(),
            fed=(True,),
            exact=exact,
            arguments=PartArguments(core=arguments),
            anchor_every=anchor_every,
            guarded=guarded,
            offload=offload,
        )

    @classmethod
    def of_parts(
        cls,
        entry: Chain,
        core: Chain,
        exit: Chain,  # noqa: A002
        *,
        arithmetic: Arithmetic,
        fed: tuple[bool, ...] = (True,),
        conditioning: Arguments = NO_ARGUMENTS,
        keep_states_every: int = 1,
        anchor_every: int | None = None,
        offload: bool = False,
    ) -> "Program":
        """Time steps of three chains, or of layers; the arguments are as in `unroll`.

        Raises:
            StreamError: Something is no reversible layer, has no exact form, or takes no such conditioning; or an
                option is not a whole number from 1 on.
        """
        parts = [chain_links(part) for part in (entry, core, exit)]
        links = (*parts[0], *parts[1], *parts[2])
        arguments = bind(links, conditioning)
        first, last = len(parts[0]), len(parts[0]) + len(parts[1])
        return cls(
            entry=parts[0],
            core=parts[1],
            exit=parts[2],
            fed=fed,
            exact=is_exact(arithmetic, links),
            arguments=PartArguments(arguments[:first], arguments[first:last], arguments[last:]),
            keep_states_every=keep_states_every,
            anchor_every=anchor_every,
            offload=offload,
        )

    def __post_init__(self) -> None:
        check_every("keep_states_every", self.keep_states_every)
        check_every("anchor_every", self.anchor_every)

    @property
    def steps(self) -> int:
        """Number of time steps."""
        return len(self.fed)

    @property
    def parts(self) -> tuple[tuple[Link, ...], ...]:
        """The layers by part."""
        return self.entry, self.core, self.exit

    @property
    def links(self) -> tuple[Link, ...]:
        """All layers in the order in which they run."""
        return (*self.entry, *self.core, *self.exit)

    def layers(self) -> Iterator[ReversibleLayer]:
        """All layers, each place once."""
        return (layer for _, layer in self.links)

    def conditioning(self) -> list[Tensor]:
        """The tensors in the arguments, each once."""
        return distinct_leaves(self.arguments) if any(self.arguments) else []

    def wants_gradients(self, given: Iterable[Streams | None], state: ChainState) -> bool:
        """Whether anything that the program knows of requires a gradient.

        Where nothing does there is nothing to save, and it is run as in stored mode: what comes by way of a closure
        then gets its gradient as there.
        """
        if any(x.requires_grad for streams in given if streams is not None for x in streams):
            return True
        if any(x.requires_grad for x in (*state.tensors(), *self.conditioning())):
            return True
        return any(p.requires_grad for layer in self.layers() for p in layer.parameters())

    def entry_wants_gradients(self, given: Iterable[Streams | None]) -> bool:
        """Whether anything that the entry reads requires a gradient, as far as the program knows."""
        inputs = (x for streams in given if streams is not None for x in streams)
        parameters = (p for _, layer in self.entry for p in layer.parameters())
        return any(x.requires_grad for x in (*inputs, *parameters, *distinct_leaves(self.arguments.entry)))

    def emptied(self) -> "Program":
        """The same program with places in its arguments instead of tensors."""
        tensors = self.conditioning()
        return (
            replace(self, arguments=replaced(self.arguments, tensors, [Placeholder() for _ in tensors]))
            if tensors
            else self
        )

    def filled(self, tensors: Sequence[Tensor]) -> "Program":
        """An emptied program with tensors in these places."""
        if not tensors:
            return self
        return replace(self, arguments=replaced(self.arguments, distinct_leaves(self.arguments, Placeholder), tensors))

    def application(self, t: int, part: Part, position: int) -> int:
        """A number for every application of a layer."""
        return t * self._before[-1] + self._before[part] + position

    @cached_property
    def _before(self) -> tuple[int, ...]:
        """How many layers of a time step come before each part, and how many it has."""
        return (0, *accumulate(map(len, self.parts)))

    def is_entry(self, application: int) -> bool:
        """Whether an application is one of a layer of the entry."""
        return application % self.application(1, ENTRY, 0) < len(self.entry)

    def name_of(self, application: int) -> str:
        """How errors call the layer of this application."""
        return self.links[application % len(self.links)].name

    def around(self, t: int, part: Part, context: Callable[[int], AbstractContextManager[object]] | None) -> Around:
        """The context of one part of a step, by position."""
        if context is None:
            return no_context
        first = self.application(t, part, 0)
        return lambda position: context(first + position)

    def anchored(self, position: int) -> bool:
        """Whether the input of this layer of the core is kept. The first one's is the caller's."""
        return self.anchor_every is not None and position > 0 and position % self.anchor_every == 0

    def recovered(self, position: int, streams: Streams) -> Streams:
        """Of the input of this layer of the core, the streams that a rewind recovers: all but a log-determinant."""
        unread = self.core[position].layer.unread if self.core else 0
        return streams[: len(streams) - unread]

    def enter(self, streams: Streams, residue: Residue | None) -> Streams:
        """Put a given input on the grid, where exact."""
        if residue is None or self.on_grid:
            return streams
        _refuse_transforms()
        streams = put_on_grid(streams)
        for x in filter(is_differentiable, streams):
            residue.watch("the input", x)
        return streams

    def enter_state(self, state: ChainState) -> ChainState:
        """Put given cells that are recovered on the grid, where exact.

        Raises:
            StreamError: A state has no tensor in the cell's place.
            ReversibilityError: A cell is too large for the grid, or not finite.
        """
        given = cells_of(self.core, state, self.exact)
        snapped: dict[int, Tensor] = {}
        notes = Residue(keep=False)
        for (name, _), cell in zip(self.core, given, strict=True):
            if cell is not None and id(cell) not in snapped:
                _refuse_transforms()
                snapped[id(cell)] = snap(cell).contiguous()
                notes.watch(f"{name}, initial cell", cell)
        notes.check_range()
        layers = [
            own if cell is None else replaced_at(own, layer.inverted_cell, snapped[id(cell)])
            for (_, layer), own, cell in zip(self.core, state.layers, given, strict=True)
        ]
        return ChainState(tuple(layers), state.carry)

    def run_core(
        self,
        t: int,
        given: Streams | None,
        features: Streams,
        state: ChainState,
        residue: Residue | None,
        context: Callable[[int], AbstractContextManager[object]] | None = None,
        keep: Keep | None = None,
        entering: Callable[[int, Streams], None] | None = None,
    ) -> tuple[Streams, ChainState]:
        """One time step up to the core's output: features and state. `entering` is called with position and input of
        each layer of the core, of an empty core once.
        """
        if given is not None:
            features, _ = run_chain(
                self.entry,
                given,
                _NO_STATE,
                residue,
                around=self.around(t, ENTRY, context),
                keep=_part(keep, ENTRY),
                arguments=self.arguments.entry,
            )
        if entering is not None and not self.core:
            entering(0, features)
        return run_chain(
            self.core,
            features,
            state,
            residue,
            around=self.around(t, CORE, context),
            keep=_part(keep, CORE),
            arguments=self.arguments.core,
            entering=entering,
        )

    def run_exit(
        self,
        t: int,
        features: Streams,
        residue: Residue | None,
        context: Callable[[int], AbstractContextManager[object]] | None = None,
        keep: Keep | None = None,
    ) -> Streams:
        """The output of a time step from the core's output."""
        streams, _ = run_chain(
            self.exit,
            features,
            _NO_STATE,
            residue,
            around=self.around(t, EXIT, context),
            keep=_part(keep, EXIT),
            arguments=self.arguments.exit,
        )
        return streams

    def undo(
        self, streams: Streams, read: Sequence[State], residue: Residue | None, new_state: ChainState | None = None
    ) -> Streams:
        """The input of a time step from its output, through all three parts.

        Args:
            streams: The output.
            read: What each layer of the core has read, see `Saved.state`.
            residue: What the step has left in exact arithmetic, which is used up; None in float arithmetic.
            new_state: The state after the step, where it has cells that are recovered.
        """
        streams = undo_chain(self.exit, streams, [()] * len(self.exit), residue, arguments=self.arguments.exit)
        streams = undo_chain(self.core, streams, read, residue, arguments=self.arguments.core, new_state=new_state)
        return undo_chain(self.entry, streams, [()] * len(self.entry), residue, arguments=self.arguments.entry)


def put_on_grid(streams: Streams) -> Streams:
    """Streams put on the grid of exact arithmetic; integers are exact as they are."""
    return tuple(snap(x) if is_differentiable(x) else x for x in streams)


def _refuse_transforms() -> None:
    if torch._C._are_functorch_transforms_active():
        raise StreamError("torch.func (grad, vmap, jvp) knows no exact arithmetic: choose arithmetic='float'")


def _part(keep: Keep | None, part: Part) -> Callable[[Saved], None] | None:
    return None if keep is None else lambda read: keep(part, read)


_NO_STATE = ChainState(())


def stack(outputs: list[Streams]) -> Streams:
    """Outputs per time step to one tensor per stream, time first."""
    return tuple(torch.stack(list(xs)) for xs in zip(*outputs, strict=True))


def flat(given: list[Streams | None]) -> list[Tensor]:
    """All given tensors in order."""
    return [x for streams in given if streams is not None for x in streams]
