"""The modules inside a layer."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from revgrad.errors import ReversibilityError


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


def is_read(module: nn.Module, buffer: Tensor) -> bool:
    """Whether a second evaluation reads this buffer. Normalisation layers in train mode only move theirs."""
    return not buffer.is_inference() and not (isinstance(module, _NormBase) and module.training)


def plain_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By name, the buffers of a module that is no normalisation layer."""
    if not isinstance(module, _NormBase):
        yield from ((name, b) for name, b in module._buffers.items() if b is not None and not b.is_inference())


# What these contexts change comes back however often they are left, and where they have not come to be entered: a net
# for what is interrupted leaves them all (see `mending.py`).


class InModes(AbstractContextManager[None]):
    """Around an evaluation: modules are in these modes, train or eval, each by itself."""

    __slots__ = ("_before", "_modules", "_training")

    def __init__(self, modules: Sequence[nn.Module], training: Sequence[bool]) -> None:
        self._modules = modules
        self._training = training
        self._before: list[tuple[nn.Module, bool]] = []

    def __enter__(self) -> None:
        pairs = zip(self._modules, self._training, strict=True)
        self._before = [(module, module.training) for module, mode in pairs if module.training != mode]
        for module, mode in self._before:
            module.training = not mode

    def __exit__(self, *error: object) -> None:
        for module, mode in self._before:
            module.training = mode


class CopiedBuffers(AbstractContextManager[None]):
    """What changes buffers of these modules changes copies, which are gone in the end."""

    __slots__ = ("_before", "_modules")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def __enter__(self) -> None:
        self._copy([m._buffers for m in self._modules])

    def __exit__(self, *error: object) -> None:
        for buffers, own in self._before:
            buffers.update(own)

    def _copy(self, moving: list[dict[str, Tensor | None]]) -> None:
        copies = [{k: b if b is None else b.clone() for k, b in buffers.items()} for buffers in moving]
        self._before = [(buffers, dict(buffers)) for buffers in moving]
        for buffers, copied in zip(moving, copies, strict=True):
            buffers.update(copied)


class Frozen(CopiedBuffers):
    """Running statistics of these normalisation layers stay where they are."""

    __slots__ = ()

    def __enter__(self) -> None:
        # In training mode the output depends on batch statistics alone, so the second evaluation may move copies.
        self._copy([m._buffers for m in self._modules if m.training and m.track_running_stats])
