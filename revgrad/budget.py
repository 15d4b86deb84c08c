"""Memory as a budget: as many layers stored as fit, the others reversed.

The chain is cut into runs of stored and of reversed layers. A stored run is plain autograd, a reversed one a Function
of its own, which keeps its output.
"""

import heapq
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Literal, NamedTuple

import torch

from revgrad.chain import ChainState, run_chain
from revgrad.cost import ChainCost, Span, Storages, measure, spans_of, union
from revgrad.errors import StreamError
from revgrad.function import run_reversible
from revgrad.layer import State, Streams
from revgrad.modules import modules_of
from revgrad.program import PartArguments, Program
from revgrad.residue import Residue
from revgrad.tracing import untraced

Budget = int | Literal["free"]

_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 1024**i for i, prefix in enumerate("KMGT", 1)},
}


def parse_bytes(size: int | str) -> int:
    """A number of bytes, or a text such as `2 GiB` or `500 MB`.

    Raises:
        StreamError: It is neither.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size)
        if match and match[2].upper() in _UNITS:
            return int(float(match[1]) * _UNITS[match[2].upper()])
    raise StreamError(
        f"memory_budget must be a number of bytes or a text such as '2 GiB' or '500 MB', got {size!r} (units: B, KB, "
        "MB, GB, TB of 1000; KiB, MiB, GiB, TiB of 1024)"
    )


def parse_budget(budget: int | str) -> Budget:
    """A number of bytes as `parse_bytes` reads it, or `free`.

    Raises:
        StreamError: It is neither.
    """
    if budget == "free":
        return "free"
    try:
        return parse_bytes(budget)
    except StreamError as error:
        raise StreamError(f"{error}; or 'free', for what leaves the peak where it is") from None


def choose_stored(cost: ChainCost, budget: Budget, anchor_every: int | None = None) -> tuple[bool, ...]:
    """Which layers to store: again and again the one that saves most recomputation per byte, as long as it fits.

    Where no layer in front of them saves more per byte, those at the end come first, as long as together they take no
    more than the largest one in front of them: they have been freed when that one is reversed, and the peak stays
    where it is.

    Args:
        cost: Of the chain.
        budget: Bytes that stored layers may take beyond what the reversed chain keeps; `free` for those layers alone
            that leave the peak where it is.
        anchor_every: See `ReversibleSequential`.

    Returns:
        Per layer, whether it is stored. Of equals the last ones are.
    """
    cut = _Cut(cost, anchor_every)
    limit = math.inf if budget == "free" else cut.kept + budget
    for unit, is_best in cut.free_at_the_peak():
        if cut.kept + cut.extra_bytes(unit) > limit or not (is_best or budget == "free"):
            break
        cut.store(unit)
    queue = [] if budget == "free" else [(-cut.worth(unit), -unit) for unit in range(len(cut.units))]
    heapq.heapify(queue)
    while queue:
        unit = -heapq.heappop(queue)[1]
        if not cut.stored[unit] and cut.kept + cut.extra_bytes(unit) <= limit:
            cut.store(unit)
            # Beside a stored layer less is to be kept where stored and reversed layers meet.
            for other in cut.reversed_beside(unit):
                heapq.heappush(queue, (-cut.worth(other), -other))
    return tuple(stored for unit, stored in zip(cut.units, cut.stored, strict=True) for _ in range(unit.layers))


class _Unit(NamedTuple):
    """A layer that costs something to recompute, with those beside it that cost nothing."""

    first: int
    last: int
    value: float

    @property
    def layers(self) -> int:
        """How many."""
        return self.last - self.first


class _Cut:
    """A chain some of whose units are stored, and what it keeps at most: a stream that a run copies counts twice."""

    def __init__(self, cost: ChainCost, anchor_every: int | None) -> None:
        self.units = _units(cost)
        self.stored = [False] * len(self.units)
        self.kept = 0
        self._cost = cost
        self._anchor_every = anchor_every
        self._holders: Counter[Hashable] = Counter()
        self._hold(cost.returned, 1)
        self._hold(self._reversed(0, len(self.units)), 1)

    def free_at_the_peak(self) -> Iterator[tuple[int, bool]]:
        """Units from the last one on that together save no more than the largest one in front of them; and whether none
        in front saves more recomputation per byte of its own.
        """
        saved = [union(layer.saved for layer in self._cost.layers[u.first : u.last]) for u in self.units]
        sizes = [sum(storages.values()) for storages in saved]
        rates = [unit.value / max(1, size) for unit, size in zip(self.units, sizes, strict=True)]
        largest, best = list(accumulate(sizes, max)), list(accumulate(rates, max))
        together: Storages = {}
        for unit in reversed(range(1, len(self.units))):
            together |= saved[unit]
            if sum(together.values()) > largest[unit - 1]:
                return
            yield unit, rates[unit] >= best[unit - 1]

    def worth(self, unit: int) -> float:
        """Recomputation saved per byte."""
        extra = self.extra_bytes(unit)
        return self.units[unit].value / extra if extra > 0 else math.inf

    def extra_bytes(self, unit: int) -> int:
        """What storing a unit would add."""
        before = self.kept
        removed, added = self._change(unit)
        self._exchange(removed, added)
        extra = self.kept - before
        self._exchange(added, removed)
        return extra

    def store(self, unit: int) -> None:
        """Store a unit."""
        self._exchange(*self._change(unit))
        self.stored[unit] = True

    def reversed_beside(self, unit: int) -> list[int]:
        """The neighbours that are not stored."""
        return [u for u in (unit - 1, unit + 1) if 0 <= u < len(self.units) and not self.stored[u]]

    def _change(self, unit: int) -> tuple[list[Storages], list[Storages]]:
        """Storages that nobody would hold for this unit's run any more, and those that would be held."""
        first, last = unit, unit + 1
        while first and not self.stored[first - 1]:
            first -= 1
        while last < len(self.units) and not self.stored[last]:
            last += 1
        saved = self._cost.run_storages(Span(self.units[unit].first, self.units[unit].last, stored=True))
        return [self._reversed(first, last)], [saved, self._reversed(first, unit), self._reversed(unit + 1, last)]

    def _reversed(self, first: int, last: int) -> Storages:
        if first == last:
            return {}
        run = Span(self.units[first].first, self.units[last - 1].last, stored=False)
        return self._cost.run_storages(run, self._anchor_every)

    def _exchange(self, removed: list[Storages], added: list[Storages]) -> None:
        for storages in added:
            self._hold(storages, 1)
        for storages in removed:
            self._hold(storages, -1)

    def _hold(self, storages: Storages, by: int) -> None:
        for storage, size in storages.items():
            before = self._holders[storage]
            self._holders[storage] += by
            self.kept += size * (bool(before + by) - bool(before))


def _units(cost: ChainCost) -> list[_Unit]:
    """Free layers go with the layer behind them, those at the end with the one in front of them."""
    units: list[_Unit] = []
    first = 0
    for position, layer in enumerate(cost.layers):
        # Operations that are not counted work on what they save: they break ties, and count where there are no others.
        value = layer.recomputed_flops + sum(layer.saved.values()) / 4
        if value:
            units.append(_Unit(first, position + 1, value))
            first = position + 1
    if first < len(cost.layers):
        last = units.pop() if units else _Unit(first, first, 0.0)
        units.append(last._replace(last=len(cost.layers)))
    return units


def run_partly_stored(
    program: Program, streams: Streams, state: ChainState, stored: tuple[bool, ...]
) -> tuple[Streams, ChainState]:
    """Run the core of a program for one time step, with these layers stored and the others reversed."""
    residue = Residue(keep=False) if program.exact else None
    own: list[State] = []
    carry = state.carry
    for first, last, is_stored in spans_of(stored):
        arguments = PartArguments(core=program.arguments.core[first:last])
        part = replace(program, core=program.core[first:last], arguments=arguments, on_grid=first > 0)
        carries = any(layer.carries for _, layer in part.core)
        before = ChainState(state.layers[first:last], carry if carries else ())
        if is_stored or not part.wants_gradients([streams], before):
            streams = part.enter(streams, residue)
            streams, after = run_chain(part.core, streams, before, residue, arguments=part.arguments.core)
        else:
            streams, after = run_reversible(part, [streams], before, stacked=False, residue=residue)
        own += after.layers
        carry = after.carry if carries else carry
    if residue is not None:
        residue.check_range()
    return streams, ChainState(tuple(own), carry)


@untraced
def stored_layers(
    program: Program, streams: Streams, state: ChainState, budget: Budget, known: dict[Hashable, tuple[bool, ...]]
) -> tuple[bool, ...]:
    """Which layers of a program's core a budget stores. What has been decided is looked up in `known`, and what is
    decided is put there.
    """
    key = (budget, _signature(program, streams, state))
    if key not in known:
        known[key] = choose_stored(measure(program, streams, state), budget, program.anchor_every)
    return known[key]


def _signature(program: Program, streams: Streams, state: ChainState) -> Hashable:
    """What the cost of a chain depends on: equal signatures, equal costs."""
    kind = streams[0].device.type
    tensors = (*streams, *state.tensors(), *program.conditioning())
    modules = [module for layer in program.layers() for module in modules_of(layer)]
    return (
        tuple((x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in tensors),
        tuple(link.name for link in program.core),
        tuple([module.training for module in modules]),
        tuple([x.requires_grad for module in modules for x in module._parameters.values() if x is not None]),
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        program.exact,
        program.anchor_every,
    )
