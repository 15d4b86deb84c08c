"""Makes a second evaluation of a layer see what the first one saw.

That is: the parameters given to the forward pass, train or eval mode, random numbers, autocast. And what only the
first evaluation may do is kept from happening twice: running statistics of normalisation layers move once.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from revgrad.errors import ReversibilityError
from revgrad.layer import ReversibleLayer


@dataclass(frozen=True)
class Slot:
    """A place in a module that holds a parameter. A shared parameter has several."""

    module: nn.Module
    name: str
    index: int
    """Which of the parameters it holds."""


class Snapshot:
    """What the forward pass of some layers depends on, taken when it starts."""

    def __init__(self, layers: Iterable[ReversibleLayer]) -> None:
        self.modules: list[nn.Module] = []
        self.parameters: list[nn.Parameter] = []
        self.slots: list[Slot] = []
        self._indices: dict[int, int] = {}
        self._of_layer: dict[int, list[int]] = {}
        seen: set[int] = set()
        for layer in layers:
            mine: dict[int, None] = {}
            for module in layer.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        mine[self._index(parameter)] = None
                        if id(module) not in seen:
                            self.slots.append(Slot(module, name, self._index(parameter)))
                if id(module) not in seen:
                    seen.add(id(module))
                    self.modules.append(module)
            self._of_layer[id(layer)] = list(mine)
        self._training = [m.training for m in self.modules]
        self._buffers = [(m, name, b, b._version) for m in self.modules for name, b in _plain_buffers(m)]
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in _autocast_devices()
        ]
        self._random_states: dict[int, list[tuple[torch.device, Tensor]]] = {}

    def indices_of(self, layer: ReversibleLayer) -> list[int]:
        """Which parameters a layer has."""
        return self._of_layer[id(layer)]

    def _index(self, parameter: nn.Parameter) -> int:
        index = self._indices.setdefault(id(parameter), len(self.parameters))
        if index == len(self.parameters):
            self.parameters.append(parameter)
        return index

    @contextmanager
    def recording(self, application: int, device: torch.device) -> Iterator[None]:
        """Around the first evaluation: keep the random state it started from, if it drew anything."""
        before = _random_states(device)
        yield
        if any(not torch.equal(a, b) for (_, a), (_, b) in zip(before, _random_states(device), strict=True)):
            self._random_states[application] = before

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

    @contextmanager
    def replaying_all(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Around a whole backward pass: parameters, modes and statistics as in the forward pass; restored afterwards.

        Args:
            parameters: Stand-ins for `self.parameters`. They are leaves of their own, so that hooks on the real
                parameters fire once, on the final gradient.
        """
        with ExitStack() as stack:
            for slot in self.slots:
                stack.callback(slot.module._parameters.__setitem__, slot.name, slot.module._parameters[slot.name])
                slot.module._parameters[slot.name] = parameters[slot.index]  # type: ignore[assignment]
            for module, training in zip(self.modules, self._training, strict=True):
                if module.training != training:
                    stack.callback(setattr, module, "training", module.training)
                    module.training = training
            stack.enter_context(self.frozen_statistics())
            yield

    @contextmanager
    def frozen_statistics(self) -> Iterator[None]:
        """Around a second evaluation: running statistics of normalisation layers stay where they are.

        In training mode the output depends on batch statistics alone, so the second evaluation moves copies.
        """
        with ExitStack() as stack:
            for module in self.modules:
                if isinstance(module, _NormBase) and module.training and module.track_running_stats:
                    stack.callback(module._buffers.update, dict(module._buffers))
                    module._buffers.update({k: b if b is None else b.clone() for k, b in module._buffers.items()})
            yield

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint`: its recomputation must not move the statistics either."""
        return nullcontext(), self.frozen_statistics()

    @contextmanager
    def replaying(self, application: int) -> Iterator[None]:
        """Around a second evaluation: random state and autocast of the first."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            if states := self._random_states.get(application):
                for device, state in states:
                    stack.callback(_set_random_state, device, _get_random_state(device))
                    _set_random_state(device, state)
            yield


def _plain_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(module, _NormBase):
        yield from ((name, b) for name, b in module._buffers.items() if b is not None and not b.is_inference())


def _autocast_devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _random_states(device: torch.device) -> list[tuple[torch.device, Tensor]]:
    devices = [torch.device("cpu")] + ([device] if device.type == "cuda" else [])
    return [(d, _get_random_state(d)) for d in devices]


def _get_random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
