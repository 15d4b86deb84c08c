"""What a chain costs: the bytes that each way to run it keeps, and the operations to compute a layer again."""

import random
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from revgrad.attributes import Contents
from revgrad.batch_statistics import Kept, keeping, reusable
from revgrad.chain import ChainState, run_chain
from revgrad.graphless import Uncached
from revgrad.layer import NO_ARGUMENTS, ReversibleLayer, Streams
from revgrad.memory import storages_of
from revgrad.modules import check_materialised
from revgrad.program import Program, put_on_grid
from revgrad.residue import Residue

Storages = dict[Hashable, int]
"""Bytes by storage: in a union each storage counts once."""

_FINGERPRINT_BYTES = 3 * 8


class StreamStorage(NamedTuple):
    """One stream at one place of a chain."""

    storage: Hashable
    storage_bytes: int
    own_bytes: int
    """Of a copy: where the stream is a view, less than those of its storage."""


@dataclass(frozen=True)
class LayerCost:
    """One layer of a `ChainCost`."""

    name: str
    flops: int
    """Of one evaluation."""
    recomputed_flops: int
    """Of what the backward pass evaluates again where the layer is reversed."""
    saved: Storages
    """What its graph keeps where it is stored."""
    read: Storages
    """Its conditioning state, which is kept where it is reversed."""
    statistics: Storages = field(default_factory=dict)
    """Its batch statistics, likewise."""


class Span(NamedTuple):
    """Consecutive layers that are all stored or all reversed: positions, the last one not included."""

    first: int
    last: int
    stored: bool


@dataclass(frozen=True)
class ChainCost:
    """What the layers of a chain cost. What exists before the forward pass counts nothing."""

    layers: tuple[LayerCost, ...]
    streams: tuple[tuple[StreamStorage, ...], ...]
    """In front of every layer, and behind the last one."""
    reservoirs: tuple[Storages, ...]
    """Of exact arithmetic, likewise. The words that spill out of them depend on the data, and are not counted."""
    returned: Storages
    """The states handed on."""
    exact: bool

    def kept(self, stored: Sequence[bool], anchor_every: int | None = None) -> int:
        """Bytes alive between forward and backward pass, the results included, where these layers are stored and the
        others reversed.
        """
        found = dict(self.returned)
        copied: set[Hashable] = set()
        for run in spans_of(stored):
            # Behind a run that has copied a stream, its copy is the stream.
            found |= {k: n for k, n in self.run_storages(run, anchor_every).items() if k not in copied}
            copied |= {self.streams[run.last][i].storage for i in self._copies(run)}
        return sum(found.values())

    def kept_by_checkpoints(self) -> int:
        """The same for `torch.utils.checkpoint` around every layer, which keeps its input if it saves anything."""
        found = [self.returned, _storages(self.streams[-1])]
        for layer, streams, reservoirs in zip(self.layers, self.streams, self.reservoirs, strict=False):
            if layer.saved:
                found += [_storages(streams), layer.read, reservoirs]
        return sum(union(found).values())

    def run_storages(self, run: Span, anchor_every: int | None = None) -> Storages:
        """What one run keeps alive."""
        layers = self.layers[run.first : run.last]
        if run.stored:
            found = _storages(self.streams[-1]) if run.last == len(self.layers) else {}
            for layer in layers:
                found |= layer.saved
            return found
        copies = self._copies(run)
        found = _storages(x for i, x in enumerate(self.streams[run.last]) if i not in copies)
        found |= {("copy", run.last, i): n for i, n in copies.items()}
        anchors = range(run.first + anchor_every, run.last, anchor_every) if anchor_every else ()
        for position in anchors:
            found |= _storages(self.streams[position])
        for layer in layers:
            found |= layer.read | layer.statistics
        found |= {("fingerprint", run.first): _FINGERPRINT_BYTES * len(self.streams[run.first])}
        return found | self.reservoirs[run.first] | self.reservoirs[run.last]

    def _copies(self, run: Span) -> dict[int, int]:
        """Which outputs of a run are copies, and their bytes: of a reversed run those that no layer has touched, since
        an output must not be the caller's tensor. Putting the input on the grid has made copies already.
        """
        if run.stored or (self.exact and run.first == 0):
            return {}
        given = _storages(self.streams[run.first])
        return {i: x.own_bytes for i, x in enumerate(self.streams[run.last]) if x.storage in given}


def spans_of(stored: Sequence[bool]) -> list[Span]:
    """Cut a chain where stored and reversed layers meet."""
    runs, first = [], 0
    for kind, group in groupby(stored):
        last = first + len(list(group))
        runs.append(Span(first, last, kind))
        first = last
    return runs


def measure(program: Program, streams: Streams, state: ChainState) -> ChainCost:
    """Run every layer of a program's core once, with its graph, which is dropped before the next one runs.

    Under fake tensors nothing is computed. On real ones it is one forward pass more. Random state, buffers and
    attributes of the modules are restored.

    Args:
        program: With one time step.
        streams: Its input.
        state: Conditioning states.
    """
    modules = list(dict.fromkeys(m for layer in program.layers() for m in layer.modules()))
    arguments = program.arguments.core or (NO_ARGUMENTS,) * len(program.core)
    device = streams[0].device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        _other_random_states(),
        _undisturbed(modules),
        Uncached(),
        _uncompiled(),
        torch.enable_grad(),
        Flops() as counter,
    ):
        weights = [x for m in modules for x in (*m._parameters.values(), *m._buffers.values()) if x is not None]
        ledger = _Ledger([*streams, *state.tensors(), *program.conditioning(), *weights])
        residue = Residue(keep=False) if program.exact else None
        streams = put_on_grid(streams) if program.exact else streams
        carry, layers = state.carry, []
        own_states: list[Tensor] = []
        places, reservoirs = [ledger.streams(streams)], [ledger.storages(_tensors(residue))]
        for link, own, given in zip(program.core, state.layers, arguments, strict=True):
            before = counter.total
            streams, carry = _cut_off(streams), _cut_off(carry)
            read = ledger.storages([*own, *(carry if link.layer.carries else ())])
            kept: Kept = {}
            with ledger.saving() as saved, keeping(reusable(link.layer, link.layer.modules()), kept):
                streams, new = run_chain((link,), streams, ChainState((own,), carry), residue, arguments=(given,))
                flops = counter.total - before
                again = flops * link.layer.evaluations_in_rewind
                statistics = ledger.storages(x for of_one in kept.values() for x in of_one or ())
                layers.append(LayerCost(link.name, flops, again, saved, read, statistics))
                places.append(ledger.streams(streams))
                reservoirs.append(ledger.storages(_tensors(residue)))
            carry = new.carry
            own_states += _cut_off(new.layers[0])
            ledger.forget_all_but([*streams, *own_states, *carry, *_tensors(residue)])
        returned = ledger.storages([*own_states, *carry])
    return ChainCost(tuple(layers), tuple(places), tuple(reservoirs), returned, program.exact)


class Flops(TorchDispatchMode):
    """Counts FLOPs as `torch.utils.flop_counter` does, whose own context keeps every graph alive by its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        count = flop_registry.get(packet) or _MORE.get(packet)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


_ATEN = torch.ops.aten
_MORE = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
}


class _Ledger:
    """Gives every storage a number that no later one has, though memory is used again."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        self._numbers: dict[int, int] = {}
        self._next = 0
        self._held = [storage for x in given for storage in storages_of(x)]
        self._given = set(map(self._number, self._held))
        self._given_addresses = set(self._numbers)

    def storages(self, tensors: Iterable[Tensor]) -> Storages:
        """What tensors keep alive; what was there before counts nothing."""
        return _storages(self.streams(tensors))

    def streams(self, tensors: Iterable[Tensor]) -> tuple[StreamStorage, ...]:
        """The same, one by one."""
        found = []
        for x in tensors:
            for storage in storages_of(x):
                number, size = self._number(storage), storage.nbytes()
                own = x.numel() * x.element_size() if x.layout is torch.strided else size
                found.append(StreamStorage(number, 0 if number in self._given else size, own))
        return tuple(found)

    @contextmanager
    def saving(self) -> Iterator[Storages]:
        """Collects what autograd saves."""
        found: Storages = {}
        alive = []

        def pack(x: Tensor) -> Tensor:
            alive.extend(storages_of(x))
            found.update(self.storages([x]))
            return x.detach()  # a result that its own node keeps would be a reference cycle

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            yield found

    def forget_all_but(self, tensors: Iterable[Tensor]) -> None:
        """Addresses of other storages may be used again."""
        alive = {storage._cdata for x in tensors for storage in storages_of(x)} | self._given_addresses
        self._numbers = {address: number for address, number in self._numbers.items() if address in alive}

    def _number(self, storage: torch.UntypedStorage) -> int:
        if storage._cdata not in self._numbers:
            self._numbers[storage._cdata] = self._next
            self._next += 1
        return self._numbers[storage._cdata]


@contextmanager
def _undisturbed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules get stand-ins for their parameters, copies of their buffers and of tensors in attributes, and in the end
    their attributes back, and what lists, dictionaries, sets and deques in them hold.

    The stand-ins are fake under fake tensors: what is saved of a parameter is then known to be no new storage. Those of
    a layer itself, which may set them by the first input that it sees, are copies.
    """
    check_materialised(modules)
    before = [vars(module).copy() for module in modules]
    contents = Contents(before)
    parameters = {
        p: (p.detach().clone() if isinstance(m, ReversibleLayer) else p.detach()).requires_grad_(p.requires_grad)
        for m in modules
        for p in m._parameters.values()
        if p is not None
    }
    try:
        for module in modules:
            vars(module)["_parameters"] = {k: p if p is None else parameters[p] for k, p in module._parameters.items()}
            vars(module)["_buffers"] = {k: b if b is None else b.clone() for k, b in module._buffers.items()}
            vars(module)["_modules"] = dict(module._modules)  # one that the first forward pass makes may be fake
            vars(module).update({k: x.clone() for k, x in vars(module).items() if isinstance(x, Tensor)})
        yield
    finally:
        for module, attributes in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(attributes)
        contents.restore()


@contextmanager
def _other_random_states() -> Iterator[None]:
    """Python's and NumPy's random numbers are left as they are."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def _uncompiled() -> AbstractContextManager[None]:
    """Around transforms that are compiled: they run as they are written, for no compiler goes with the counting of
    FLOPs, and with `fullgraph=True` it would raise.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the compiler takes seconds to import
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _cut_off(tensors: Streams) -> Streams:
    """The same tensors without the graph that made them."""
    return tuple(x.detach().requires_grad_(x.requires_grad) for x in tensors)


def _tensors(residue: Residue | None) -> list[Tensor]:
    return [] if residue is None else [x for x in residue.tensors() if x.numel()]


def _storages(streams: Iterable[StreamStorage]) -> Storages:
    return {stream.storage: stream.storage_bytes for stream in streams}


def union(parts: Iterable[Storages]) -> Storages:
    """Every storage once."""
    found: Storages = {}
    for part in parts:
        found |= part
    return found
