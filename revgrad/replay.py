"""Makes a second evaluation of a layer see what the first one saw.

That is: the parameters given to the forward pass, train or eval mode, random numbers, autocast. And what only the
first evaluation may do is kept from happening twice: running statistics of normalisation layers move once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from revgrad.batch_statistics import Kept, keeping, reusable, reusing
from revgrad.errors import ReversibilityError
from revgrad.layer import ReversibleLayer


class Slot(NamedTuple):
    """A place in a module that holds a parameter or buffer. A shared parameter has several."""

    holder: dict[str, Any]
    """The module's own dictionary of parameters, or of buffers."""
    name: str
    parameter: int
    """Which of the parameters it holds."""


_CPU = torch.device("cpu")


class Scope:
    """The modules of one layer, or of several, each of them once.

    Args:
        modules: The modules.
        slots: Their parameters and buffers.
        layer: The only layer, where there is one.
    """

    def __init__(self, modules: list[nn.Module], slots: list[Slot], layer: ReversibleLayer | None = None) -> None:
        self.modules = modules
        self.slots = slots
        self.training = [m.training for m in modules]
        """Of each module, whether the forward pass was in train mode."""
        self.norms = [m for m in modules if isinstance(m, _NormBase)]
        self.measured = reusable(layer, self.norms) if layer is not None and self.norms else []
        """Batch normalisations whose statistics the first evaluation keeps for the second."""
        self.moving = [m for m in self.norms if m not in self.measured]
        """The other ones."""
        self.is_replayed = layer is None or layer.evaluations_in_rewind > 0 or bool(slots)
        """Whether a rewind evaluates anything again, or may read parameters or buffers."""
        self.indices = list(dict.fromkeys([slot.parameter for slot in slots]))
        """Which parameters there are, each once."""


class Snapshot:
    """What the forward pass of some layers depends on, taken when it starts.

    Args:
        layers: In the order of their applications within a time step.
    """

    def __init__(self, layers: Iterable[ReversibleLayer]) -> None:
        # And buffers: whoever changes one before the backward pass, or puts another in its place, changes the result.
        self.parameters: list[Tensor] = []
        self._indices: dict[int, int] = {}
        self._scopes: dict[int, Scope] = {}
        self._statistics: dict[int, Kept] = {}
        self._by_position: list[Scope] = []
        slots_of: dict[nn.Module, list[Slot]] = {}
        for layer in layers:
            scope = self._scopes.get(id(layer))
            if scope is not None:
                self._by_position.append(scope)
                continue
            modules, slots = modules_of(layer), []
            check_materialised(modules)
            for module in modules:
                if module not in slots_of:
                    slots_of[module] = self._slots(module)
                slots += slots_of[module]
            scope = self._scopes[id(layer)] = Scope(modules, slots, layer)
            self._by_position.append(scope)
        self._everything = Scope(list(slots_of), [slot for slots in slots_of.values() for slot in slots])
        self.slots, self.modules = self._everything.slots, self._everything.modules
        self._buffers = [(m, name, b, b._version) for m in self.modules if m._buffers for name, b in _plain_buffers(m)]
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in _autocast_devices()
        ]
        self._random_states: dict[int, dict[torch.device, Tensor]] = {}
        self._random_state: dict[torch.device, Tensor] | None = None

    def indices_of(self, layer: ReversibleLayer) -> list[int]:
        """Which parameters a layer has."""
        return self._scopes[id(layer)].indices

    def _slots(self, module: nn.Module) -> list[Slot]:
        parameters, buffers = module._parameters, module._buffers
        slots = [Slot(parameters, name, self._index(x)) for name, x in parameters.items() if x is not None]
        if buffers:
            read = [(name, x) for name, x in buffers.items() if x is not None and _is_read(module, x)]
            slots += [Slot(buffers, name, self._index(x)) for name, x in read]
        return slots

    def _index(self, parameter: Tensor) -> int:
        index = self._indices.setdefault(id(parameter), len(self.parameters))
        if index == len(self.parameters):
            self.parameters.append(parameter)
        return index

    def recording(self, application: int, device: torch.device) -> AbstractContextManager[None]:
        """Around the first evaluation: keep the random state it started from, if it drew anything, and statistics."""
        scope = self._by_position[application % len(self._by_position)]
        if not scope.is_replayed:
            return nullcontext()
        norms = None
        if scope.measured:
            kept = self._statistics[application] = {}
            norms = keeping(scope.measured, kept)
        return _Recording(self, application, device, norms)

    def drawing(self) -> list[int]:
        """The applications that have drawn random numbers."""
        return list(self._random_states)

    def check_buffers(self) -> None:
        """Raise if a buffer that the recomputation would read has changed during the forward pass.

        Raises:
            ReversibilityError: Names module and buffer. Running statistics of normalisation layers are handled and
                do not count.
        """
        for module, name, buffer, version in self._buffers:
            if buffer._version != version or module._buffers.get(name) is not buffer:
                raise ReversibilityError(
                    f"{type(module).__name__} changed its buffer '{name}' during the forward pass, so the "
                    f"recomputation in backward would see "
                    "another value: put it in eval mode, or choose mode='stored'"
                )

    def standing_in(
        self, parameters: Sequence[Tensor], layer: ReversibleLayer | None = None, application: int | None = None
    ) -> AbstractContextManager[None]:
        """Around a second evaluation: parameters, modes and statistics as in the forward pass; restored afterwards.

        Args:
            parameters: Stand-ins for `self.parameters`. They are leaves of their own, so that hooks on the real
                parameters fire once, on the final gradient.
            layer: The layer that is evaluated; by default all of them.
            application: The application of this layer whose batch statistics are used.

        Raises:
            ReversibilityError: A module has put a tensor with a graph aside, in an attribute.
        """
        scope = self._everything if layer is None else self._scopes[id(layer)]
        if not scope.is_replayed:
            return nullcontext()
        kept = None if application is None else self._statistics.get(application)
        return _StandingIn(scope, parameters, kept)

    def frozen_statistics(self) -> AbstractContextManager[None]:
        """Around a second evaluation: running statistics of normalisation layers stay where they are."""
        return _frozen(self._everything.norms)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint`: its recomputation must not move the statistics either."""
        return nullcontext(), _Anew(self.frozen_statistics)

    def replaying(self, application: int) -> AbstractContextManager[object]:
        """Around a second evaluation: random state and autocast of the first."""
        states = self._random_states.get(application, {})
        autocast = [
            torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
            for kind, enabled, dtype in self._autocast
            if enabled or torch.is_autocast_enabled(kind)
        ]
        return _replaying(autocast, states) if autocast or states else nullcontext()


# Classes: written as generators these contexts would take several times as long, and every half-step enters both.


class _Recording(AbstractContextManager[None]):
    """See `Snapshot.recording`."""

    __slots__ = ("_application", "_before", "_device", "_norms", "_snapshot")

    def __init__(
        self, snapshot: Snapshot, application: int, device: torch.device, norms: AbstractContextManager[None] | None
    ) -> None:
        self._snapshot = snapshot
        self._application = application
        self._device = device
        self._norms = norms

    def __enter__(self) -> None:
        # Nothing is drawn between one evaluation and the next.
        self._before = self._snapshot._random_state or _random_states(self._device)
        if self._norms is not None:
            self._norms.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._norms is not None:
            self._norms.__exit__(None, None, None)
        if kind is None:
            now = self._snapshot._random_state = _random_states(self._device)
            if not all(map(torch.equal, self._before.values(), now.values())):
                self._snapshot._random_states[self._application] = self._before


class _StandingIn(AbstractContextManager[None]):
    """See `Snapshot.standing_in`."""

    __slots__ = ("_before", "_caching", "_first_node", "_norms", "_parameters", "_scope", "_switched")

    def __init__(self, scope: Scope, parameters: Sequence[Tensor], kept: Kept | None) -> None:
        self._scope = scope
        self._parameters = parameters
        moving = scope.norms if kept is None else scope.moving
        self._norms: list[AbstractContextManager[None]] = [_frozen(moving)] if moving else []
        if kept is not None:
            self._norms.append(reusing(scope.measured, kept))

    def __enter__(self) -> None:
        scope = self._scope
        self._before = [holder[name] for holder, name, _ in scope.slots]
        modes = zip(scope.modules, scope.training, strict=True)
        self._switched = [(module, module.training) for module, training in modes if module.training != training]
        # A weight that parametrize.cached has kept is made of the real parameters, or of no graph at all.
        self._caching, parametrize._cache_enabled = parametrize._cache_enabled, 0
        for holder, name, i in scope.slots:
            holder[name] = self._parameters[i]
        for module, now in self._switched:
            module.training = not now
        for context in self._norms:
            context.__enter__()
        self._first_node = torch._C._autograd._get_sequence_nr()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for context in reversed(self._norms):
            context.__exit__(None, None, None)
        parametrize._cache_enabled = self._caching
        for (holder, name, _), parameter in zip(self._scope.slots, self._before, strict=True):
            holder[name] = parameter
        for module, now in self._switched:
            module.training = now
        if kind is None:
            _check_attributes(self._scope.modules, self._first_node)


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


@contextmanager
def _replaying(autocast: list[torch.autocast], states: dict[torch.device, Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in autocast:
            stack.enter_context(context)
        for device, state in states.items():
            stack.callback(_set_random_state, device, _random_states(device)[device])
            _set_random_state(device, state)
        yield


def modules_of(root: nn.Module) -> list[nn.Module]:
    """What `root.modules()` gives, without making up names; it is needed in every forward pass."""
    found: dict[nn.Module, None] = {}
    rest: list[nn.Module | None] = [root]
    while rest:
        module = rest.pop()
        if module is not None and module not in found:
            found[module] = None
            if module._modules:
                rest += reversed(module._modules.values())
    return list(found)


def check_materialised(modules: Iterable[nn.Module]) -> None:
    """Raise if a module makes its parameters only when it sees its first input: they could not be known before.

    Raises:
        ReversibilityError: Names the module.
    """
    for module in modules:
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise ReversibilityError(
                f"{type(module).__name__} has no parameters yet, it makes them for its first input: call the chain "
                "once under torch.no_grad() before training it"
            )


@contextmanager
def _frozen(norms: list[_NormBase]) -> Iterator[None]:
    # In training mode the output depends on batch statistics alone, so the second evaluation may move copies.
    before = [(m._buffers, dict(m._buffers)) for m in norms if m.training and m.track_running_stats]
    try:
        for buffers, statistics in before:
            buffers.update({k: b if b is None else b.clone() for k, b in statistics.items()})
        yield
    finally:
        for buffers, statistics in before:
            buffers.update(statistics)


def _is_read(module: nn.Module, buffer: Tensor) -> bool:
    """Whether a second evaluation reads this buffer. Normalisation layers in train mode only move theirs."""
    return not buffer.is_inference() and not (isinstance(module, _NormBase) and module.training)


def _check_attributes(modules: list[nn.Module], first_node: int) -> None:
    """Raise if a module holds a tensor with a graph that is as new as this node.

    What an evaluation puts aside it has put aside in the forward pass as well, without a graph: a loss made of it
    would give no gradient.
    """
    for module in modules:
        for name, value in module.__dict__.items():
            # In this order: nearly all attributes are those of every module, or plain values.
            if name in _OF_MODULE or type(value) in _PLAIN or not isinstance(value, _HOLDERS):
                continue
            for x in _tensors_in(value):
                if x.grad_fn is None or x.grad_fn._sequence_nr() < first_node:
                    continue
                # Hooks that compute a weight anew before every call (weight norm) leave it in an attribute.
                if not module._forward_pre_hooks:
                    raise ReversibilityError(
                        f"{type(module).__name__} keeps a tensor of shape {tuple(x.shape)} that requires a gradient in "
                        f"its attribute '{name}'. Transforms are run without a graph, so a loss made of it would give "
                        "no gradient: keep x.detach() if it is only looked at; else return it, as part of a state or "
                        "in a stream, or choose mode='stored'"
                    )


def _tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in a value, or in lists, tuples, dictionaries and namespaces in it, as deep as they go."""
    rest, seen = [value], set()
    while rest:
        x = rest.pop()
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, _HOLDERS) and id(x) not in seen:
            seen.add(id(x))
            inside = vars(x) if isinstance(x, SimpleNamespace) else x
            rest += inside.values() if isinstance(inside, dict) else inside


_PLAIN = frozenset((bool, int, float, str, type(None), torch.Size))
_HOLDERS = (Tensor, list, tuple, dict, SimpleNamespace)
_OF_MODULE = frozenset(nn.Module().__dict__)
"""Where every module keeps parameters, buffers, modules and hooks."""


def _plain_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(module, _NormBase):
        yield from ((name, b) for name, b in module._buffers.items() if b is not None and not b.is_inference())


def _autocast_devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _random_states(device: torch.device) -> dict[torch.device, Tensor]:
    states = {_CPU: torch.get_rng_state()}
    if device.type == "cuda":
        states[device] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
