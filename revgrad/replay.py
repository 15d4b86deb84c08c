"""Makes a second evaluation of a layer see what the first one saw.

That is: the parameters given to the forward pass, train or eval mode, random numbers, autocast. And what only the
first evaluation may do is kept from happening twice: running statistics of normalisation layers move once.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from revgrad.attributes import Change, changes_since, check_attributes, kept_tensors, renew, undone
from revgrad.batch_statistics import Kept, keeping, reusable, reusing
from revgrad.errors import ReversibilityError
from revgrad.gradients import newest_node
from revgrad.graphless import Uncached
from revgrad.layer import ReversibleLayer
from revgrad.mending import Mending
from revgrad.modules import Frozen, InModes, check_materialised, is_read, modules_of, plain_buffers
from revgrad.saved_tensor_hooks import Unhooked, hooked
from revgrad.threads import Use


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
        self.layer = layer
        self.slots = slots
        self.module_set = frozenset(modules)
        self.inner = [m for m in modules if not isinstance(m, ReversibleLayer)]
        """Those of transforms: what layers note in their own attributes is for good."""
        self.training = [m.training for m in modules]
        """Of each module, whether the forward pass was in train mode."""
        self.norms = [m for m in modules if isinstance(m, _NormBase)]
        self.measured = reusable(layer, self.norms) if layer is not None and self.norms else []
        """Batch normalisations whose statistics the first evaluation keeps for the second."""
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
                    slots_of[module] = self._slots(module) if module._parameters or module._buffers else []
                slots += slots_of[module]
            scope = self._scopes[id(layer)] = Scope(modules, slots, layer)
            self._by_position.append(scope)
        self.everything = Scope(list(slots_of), [slot for slots in slots_of.values() for slot in slots])
        everything = self.everything
        self.slots, self.modules, self.module_set = everything.slots, everything.modules, everything.module_set
        self._buffers = [(m, name, b, b._version) for m in self.modules if m._buffers for name, b in plain_buffers(m)]
        self._kept_tensors = kept_tensors(self.modules)
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
        ]
        self._autocasts = any(enabled for _, enabled, _ in self._autocast)
        self._changes: dict[int, list[Change]] = {}
        self._random_states: dict[int, dict[torch.device, Tensor]] = {}
        self._random_state: dict[torch.device, Tensor] | None = None
        self.mending = Mending()

    def indices_of(self, layer: ReversibleLayer) -> list[int]:
        """Which parameters a layer has."""
        return self._scopes[id(layer)].indices

    def _slots(self, module: nn.Module) -> list[Slot]:
        parameters, buffers = module._parameters, module._buffers
        slots = [Slot(parameters, name, self._index(x)) for name, x in parameters.items() if x is not None]
        if buffers:
            read = [(name, x) for name, x in buffers.items() if x is not None and is_read(module, x)]
            slots += [Slot(buffers, name, self._index(x)) for name, x in read]
        return slots

    def _index(self, parameter: Tensor) -> int:
        index = self._indices.setdefault(id(parameter), len(self.parameters))
        if index == len(self.parameters):
            self.parameters.append(parameter)
        return index

    def first_evaluation(self, application: int, device: torch.device) -> AbstractContextManager[None]:
        """Around the first evaluation: keep the random state it started from, if it drew anything, and statistics."""
        scope = self._by_position[application % len(self._by_position)]
        if not scope.is_replayed:
            return nullcontext()
        norms = None
        if scope.measured:
            kept = self._statistics[application] = {}
            norms = keeping(scope.measured, kept)
        return _FirstEvaluation(self, scope, application, device, norms)

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
                    f"recomputation in backward would see another value: put it in eval mode if it keeps statistics, "
                    "keep what grows or counts in a plain attribute instead, or choose mode='stored'"
                )
        self.check_attributes("during the forward pass")

    def check_attributes(self, when: str) -> None:
        """Raise if a module has changed a tensor that it keeps in an attribute.

        Raises:
            ReversibilityError: Names module and attribute.
        """
        for module, name, x, version in self._kept_tensors:
            if x._version != version:
                raise ReversibilityError(
                    f"{type(module).__name__} keeps a tensor in its attribute '{name}' that was changed in place "
                    f"{when}, so the recomputation in backward would see another value: put another tensor in its "
                    "place instead of changing it, or choose mode='stored'"
                )

    def renew_weights(self) -> None:
        """Weights that hooks compute anew before every call (pruning, weight norm) once more, now with a graph, for a
        penalty on them.
        """
        for module in self.modules:
            if module._forward_pre_hooks and torch.is_grad_enabled():
                renew(module)

    def standing_in(
        self, parameters: Sequence[Tensor], layer: ReversibleLayer | None = None, application: int | None = None
    ) -> AbstractContextManager[None]:
        """Around a second evaluation: parameters, modes and statistics as in the forward pass; restored afterwards.

        Args:
            parameters: Stand-ins for `self.parameters`. They are leaves of their own, so that hooks on the real
                parameters fire once, on the final gradient.
            layer: The layer that is evaluated, and differentiated at once; by default all of them.
            application: The application of this layer whose batch statistics are used.

        Raises:
            ReversibilityError: A module has put a tensor with a graph aside, in an attribute.
        """
        scope = self.everything if layer is None else self._scopes[id(layer)]
        if not scope.is_replayed:
            return nullcontext()
        kept = None if application is None else self._statistics.get(application)
        return _StandingIn(self, scope, parameters, kept)

    def frozen_statistics(self) -> AbstractContextManager[None]:
        """Around a second evaluation: running statistics of normalisation layers stay where they are."""
        return Frozen(self.everything.norms)

    def replaying(self, application: int) -> AbstractContextManager[object]:
        """Around a second evaluation: random state and autocast of the first."""
        states = self._random_states.get(application, {})
        autocast = []
        if self._autocasts or torch._C._is_any_autocast_enabled():
            autocast = [
                torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                for kind, enabled, dtype in self._autocast
                if enabled or torch.is_autocast_enabled(kind)
            ]
        changes = self._changes.get(application, [])
        return _replaying(autocast, states, changes) if autocast or states or changes else nullcontext()


# Classes: written as generators these contexts would take several times as long, and every half-step enters both.


class _FirstEvaluation(AbstractContextManager[None]):
    """See `Snapshot.first_evaluation`."""

    __slots__ = ("_application", "_attributes", "_before", "_device", "_norms", "_scope", "_snapshot", "thread")

    def __init__(
        self,
        snapshot: Snapshot,
        scope: Scope,
        application: int,
        device: torch.device,
        norms: AbstractContextManager[None] | None,
    ) -> None:
        self._snapshot = snapshot
        self._scope = scope
        self._application = application
        self._device = device
        self._norms = norms

    def __enter__(self) -> None:
        self._attributes = [vars(module).copy() for module in self._scope.inner]
        # Nothing is drawn between one evaluation and the next.
        self._before = self._snapshot._random_state or _random_states(self._device)
        if self._norms is not None:
            self.thread, self._snapshot.mending.entered = get_ident(), self
            self._norms.__enter__()

    def undo(self) -> None:
        """Put back what there was; may be called again."""
        if self._norms is not None:
            self._norms.__exit__(None, None, None)
            self._snapshot.mending.entered = None

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.undo()
        if kind is None:
            now = self._snapshot._random_state = _random_states(self._device)
            if not all(map(torch.equal, self._before.values(), now.values())):
                self._snapshot._random_states[self._application] = self._before
            changes = changes_since(self._scope.inner, self._attributes)
            if changes:
                self._snapshot._changes[self._application] = changes


class _StandingIn(AbstractContextManager[None]):
    """See `Snapshot.standing_in`."""

    __slots__ = ("_before", "_contexts", "_first_node", "_parameters", "_scope", "_snapshot", "_use", "thread")

    def __init__(self, snapshot: Snapshot, scope: Scope, parameters: Sequence[Tensor], kept: Kept | None) -> None:
        self._snapshot = snapshot
        self._scope = scope
        self._parameters = parameters
        self._use = Use(scope.module_set, exclusive=True)
        self._contexts: list[AbstractContextManager[None]] = [InModes(scope.modules, scope.training)]
        norms = scope.norms
        if kept is not None:
            # What takes the statistics of the first evaluation moves none, unless a hook does.
            norms = [m for m in norms if kept.get(m) is None or m._forward_hooks or m._forward_pre_hooks]
        if norms:
            self._contexts.append(Frozen(norms))
        # A weight that parametrize.cached has kept is made of the real parameters, or of no graph at all.
        # And what autocast keeps, of an evaluation or of its gradients, would outlive them.
        self._contexts.append(Uncached())
        if kept is not None:
            self._contexts.append(reusing(scope.measured, kept))
        if scope.layer is not None and hooked():
            self._contexts.append(Unhooked())

    def __enter__(self) -> None:
        scope = self._scope
        self._use.__enter__()
        self._before = [holder[name] for holder, name, _ in scope.slots]
        self.thread, self._snapshot.mending.entered = self._use.thread, self
        try:
            for context in self._contexts:
                context.__enter__()
        except BaseException:  # there may be no memory for copies of statistics
            self.undo()
            raise
        for holder, name, i in scope.slots:
            holder[name] = self._parameters[i]
        # The rewind of a single layer looks itself.
        self._first_node = newest_node() if scope.layer is None else None

    def undo(self) -> None:
        """Put back what there was; may be called again."""
        for (holder, name, _), parameter in zip(self._scope.slots, self._before, strict=True):
            holder[name] = parameter
        for context in reversed(self._contexts):
            context.__exit__(None, None, None)
        self._use.__exit__(None, None, None)
        self._snapshot.mending.entered = None

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.undo()
        if kind is None and self._first_node is not None:
            check_attributes(self._scope.modules, self._first_node)


@contextmanager
def _replaying(
    autocast: list[torch.autocast], states: dict[torch.device, Tensor], changes: list[Change]
) -> Iterator[None]:
    with ExitStack() as stack:
        if changes:
            stack.enter_context(undone(changes))
        for context in autocast:
            stack.enter_context(context)
        for device, state in states.items():
            stack.callback(_set_random_state, device, _random_states(device)[device])
            _set_random_state(device, state)
        yield


def _random_states(device: torch.device) -> dict[torch.device, Tensor]:
    states = {_CPU: torch.default_generator.get_state()}
    if device.type == "cuda":
        states[device] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
