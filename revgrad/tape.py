"""What the forward pass leaves for the backward pass, and how its tensors go through `save_for_backward`."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from revgrad.chain import ChainState, Saved
from revgrad.checks import Checks, current_checks
from revgrad.layer import Streams
from revgrad.offload import Keeper, Stowed
from revgrad.program import CORE, Part
from revgrad.residue import Residue


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
    saved: dict[tuple[int, Part], list[Saved]] = field(default_factory=dict)
    """Per time step and part, what each layer has read."""
    residue: Residue | None = None
    fingerprints: dict[tuple[int, Part, int], Tensor] = field(default_factory=dict)
    """Per time step, part and position of a layer, what its recovered input is compared with."""
    anchors: dict[tuple[int, int], Streams] = field(default_factory=dict)
    """Per time step and position in the core, the layer's input."""
    keeper: Keeper = field(default_factory=Keeper)
    """Where states, features and anchors wait: what was taken out of the tape is to be fetched with it."""
    cells: list[Tensor | None] = field(default_factory=list)
    """By layer of the core, the final cell where it is recovered; empty where states are recomputed."""
    checks: Checks = field(default_factory=current_checks)
    """Those of the forward pass, for the backward pass as well."""

    def keep(self, t: int, part: Part, saved: Saved, parts: tuple[Part, ...]) -> None:
        """Note what the next layer of a part has read, if it is one of these parts."""
        if part in parts:
            if saved.state:
                saved = replace(saved, state=self.keeper.out(saved.state))
            self.saved.setdefault((t, part), []).append(saved)

    def anchor(self, t: int, position: int, streams: Streams) -> None:
        """Note a layer's input."""
        self.keeper.settle()  # the anchor before
        self.anchors[t, position] = self.keeper.out(streams)

    def start(self, segment: Segment) -> None:
        """Note where a segment starts."""
        features = self.keeper.out(segment.features)
        self.segments.append(replace(segment, state=self._out(segment.state), features=features))

    def _out(self, state: ChainState) -> ChainState:
        return state.replace(self.keeper.out(state.tensors()))

    def take_saved(self, t: int, part: Part) -> list[Saved]:
        """What each layer of a part has read, which the tape then forgets."""
        kept = self.saved.pop((t, part), [])
        states = iter(self.keeper.back([x for one in kept for x in one.state]))
        self._look_ahead()
        return [
            replace(saved, state=tuple(next(states) for _ in saved.state)) if saved.state else saved for saved in kept
        ]

    def take_anchor(self, t: int, position: int) -> Streams | None:
        """A layer's input, if it was kept; the tape then forgets it."""
        anchor = self.anchors.pop((t, position), None)
        if anchor is None:
            return None
        anchor = self.keeper.back(anchor)
        self._look_ahead()
        return anchor

    def start_of(self, segment: Segment) -> tuple[Streams, ChainState]:
        """Features and state from which a segment that has left `segments` is run again."""
        tensors = self.keeper.back((*segment.features, *segment.state.tensors()))
        for before in self.segments[-1:]:
            self.keeper.prefetch((*before.features, *before.state.tensors()))
        n = len(segment.features)
        return tensors[:n], segment.state.replace(tensors[n:])

    def _look_ahead(self) -> None:
        """What was noted last is wanted next. Only the core has states."""
        step = next((key for key in reversed(self.saved) if key[1] is CORE), None)
        if step is not None:
            self.keeper.prefetch(x for saved in self.saved[step] for x in saved.state)
        self.keeper.prefetch(next(reversed(self.anchors.values()), ()))


@dataclass
class _SavedIndex:
    """Stands for the tensor of this number."""

    index: int


@dataclass
class _PackedResidue:
    layout: Any
    slots: list[_SavedIndex]


def _map(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a function to all that is neither a container nor a plain value in the fields of a tape."""
    # Most layers have no state.
    if tree is None or (isinstance(tree, tuple) and not tree) or (isinstance(tree, Saved) and not tree.state):
        return tree
    if isinstance(tree, ChainState):
        return ChainState(*(_map(x, change) for x in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map(x, change) for x in tree)
    if isinstance(tree, dict):
        return {k: _map(v, change) for k, v in tree.items()}
    if isinstance(tree, (Segment, Saved)):
        return type(tree)(*(_map(getattr(tree, f.name), change) for f in fields(tree)))
    return change(tree)


def pack(tape: Tape) -> tuple[Tape, list[Tensor]]:
    """Take the tensors out of a tape: what is left goes on the context, the tensors into `save_for_backward`."""
    tensors: list[Tensor] = []

    # Not recursive: a function that refers to itself is a reference cycle, which would hold the tensors until the
    # collector runs.
    def slot(x: Tensor) -> _SavedIndex:
        tensors.append(x)
        return _SavedIndex(len(tensors) - 1)

    def out(item: Any) -> Any:
        if isinstance(item, Residue):
            return _PackedResidue(item.layout(), [slot(x) for x in item.tensors()])
        return slot(item) if isinstance(item, Tensor) else item

    return _map_tape(tape, out), tensors


def unpack(layout: Tape, tensors: tuple[Tensor, ...]) -> Tape:
    """Put the tensors back into a new tape; the layout stays as it is, for a second backward pass."""

    def back(item: Any) -> Any:
        if isinstance(item, Stowed):
            item.check()
        if isinstance(item, _PackedResidue):
            return Residue.unpack(item.layout, [tensors[x.index] for x in item.slots], layout.checks)
        return tensors[item.index] if isinstance(item, _SavedIndex) else item

    return _map_tape(layout, back)


def _map_tape(tape: Tape, change: Callable[[Any], Any]) -> Tape:
    return replace(
        tape,
        segments=_map(tape.segments, change),
        saved=_map(tape.saved, change),
        residue=_map(tape.residue, change),
        anchors=_map(tape.anchors, change),
        keeper=tape.keeper.anew(),
        cells=_map(tape.cells, change),
    )
