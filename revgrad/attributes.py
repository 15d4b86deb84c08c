"""What modules keep in attributes: the second evaluation of a layer finds them as the first one did."""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from operator import is_
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from revgrad.errors import ReversibilityError

_PLAIN = frozenset((bool, int, float, str, type(None), torch.Size))
_NO_TENSORS = _PLAIN | {tuple, list, dict, set, OrderedDict, FunctionType, BuiltinFunctionType}
_HOLDERS = (list, tuple, dict, SimpleNamespace, Tensor)
_OF_MODULE = frozenset(nn.Module().__dict__)
"""Where every module keeps parameters, buffers, modules and hooks."""
_ABSENT = object()


class Change(NamedTuple):
    """An attribute that an evaluation has changed, and what it was before."""

    module: nn.Module
    name: str
    before: Any


def changes_since(modules: Sequence[nn.Module], before: Sequence[dict[str, Any]]) -> list[Change]:
    """The attributes of modules that are others than before."""
    found = []
    for module, old in zip(modules, before, strict=True):
        new = vars(module)
        if len(new) == len(old) and all(map(is_, new.values(), old.values())):
            continue
        names = [name for name in {**old, **new} if name not in _OF_MODULE]
        pairs = [(name, old.get(name, _ABSENT)) for name in names]
        found += [Change(module, name, value) for name, value in pairs if new.get(name, _ABSENT) is not value]
    return found


@contextmanager
def undone(changes: Sequence[Change]) -> Iterator[None]:
    """Attributes are as they were before these changes, and in the end as they are now.

    But one that then holds a tensor with a graph is left, for `check_attributes` to find.
    """
    now = [vars(module).get(name, _ABSENT) for module, name, _ in changes]
    try:
        for module, name, before in changes:
            _put(module, name, before)
        yield
    finally:
        for (module, name, _), value in zip(changes, now, strict=True):
            graph = any(x.grad_fn is not None for x in held_tensors(vars(module).get(name)))
            if not graph or name in _computed_by_hooks(module):
                _put(module, name, value)


def _put(module: nn.Module, name: str, value: Any) -> None:
    if value is _ABSENT:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = value


class Contents:
    """What lists, dictionaries, sets and deques in attributes hold.

    Args:
        attributes: By module, its attributes.
    """

    def __init__(self, attributes: Sequence[dict[str, Any]]) -> None:
        own = [x for of_one in attributes for name, x in of_one.items() if name not in _OF_MODULE]
        self._before = [(x, copy(x)) for x in own if type(x) in (list, dict, set, deque)]

    def restore(self) -> None:
        """Put it back, into the same containers."""
        for container, content in self._before:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(content)


def check_attributes(modules: Sequence[nn.Module], first_node: int) -> None:
    """Raise if a module holds a tensor with a graph that is as new as this node.

    What an evaluation puts aside it has put aside in the forward pass as well, without a graph: a loss made of it
    would give no gradient.

    Raises:
        ReversibilityError: Names module and attribute.
    """
    for module in modules:
        for name, value in module.__dict__.items():
            kind = type(value)
            # In this order: nearly all attributes are those of every module, or plain values, or sizes of kernels.
            if name in _OF_MODULE or kind in _PLAIN or not isinstance(value, _HOLDERS):
                continue
            if kind in (tuple, list) and _PLAIN.issuperset(map(type, value)):
                continue
            for x in held_tensors(value):
                if x.grad_fn is None or x.grad_fn._sequence_nr() < first_node or name in _computed_by_hooks(module):
                    continue
                raise ReversibilityError(
                    f"{type(module).__name__} keeps a tensor of shape {tuple(x.shape)} that requires a gradient in "
                    f"its attribute '{name}'. Transforms are run without a graph, so a loss made of it would give "
                    "no gradient: keep x.detach() if it is only looked at; else return it, as part of a state or "
                    "in a stream, or choose mode='stored'"
                )


def held_tensors(value: object) -> Iterator[Tensor]:
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


def kept_tensors(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str, Tensor, int]]:
    """Tensors in attributes, which PyTorch knows nothing of, with their versions."""
    return [
        (module, name, x, x._version)
        for module in modules
        if not _NO_TENSORS.issuperset(map(type, vars(module).values()))
        for name, x in vars(module).items()
        if name not in _OF_MODULE and isinstance(x, Tensor) and not x.is_inference()
    ]


def renew(module: nn.Module) -> None:
    """Compute once more the weights that hooks compute before every call; no state moves."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
        elif isinstance(hook, (WeightNorm, BasePruningMethod)):
            hook(module, ())


def _computed_by_hooks(module: nn.Module) -> list[str]:
    """Attributes that hold weights computed anew before every call: their graph is nobody's loss."""
    hooks = module._forward_pre_hooks.values()
    named = [hook.name for hook in hooks if isinstance(hook, (WeightNorm, SpectralNorm))]
    return named + [hook._tensor_name for hook in hooks if isinstance(hook, BasePruningMethod)]
