"""Hooks on saved tensors (`torch.autograd.graph.save_on_cpu`), where a backward pass runs inside their context.

The graph of a second evaluation lives only until it has been differentiated: moving what it saves elsewhere and back
takes time for nothing. And a hook that returns the tensor that it is given ties a node to itself, so that a graph of
which nothing is differentiated would stay for good.
"""

from contextlib import AbstractContextManager
from typing import Any

from torch._C._autograd import (
    _pop_saved_tensors_default_hooks,
    _push_saved_tensors_default_hooks,
    _top_saved_tensors_default_hooks,
)


def hooked() -> bool:
    """Whether there are such hooks."""
    return _top_saved_tensors_default_hooks(False) is not None


class Unhooked(AbstractContextManager[None]):
    """None of the hooks of now. May be left more than once, and without having been entered (see `mending.py`)."""

    __slots__ = ("_hooks",)

    def __init__(self) -> None:
        self._hooks: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        while (top := _top_saved_tensors_default_hooks(False)) is not None:
            self._hooks.append(top)
            _pop_saved_tensors_default_hooks()

    def __exit__(self, *error: object) -> None:
        while self._hooks:
            _push_saved_tensors_default_hooks(*self._hooks.pop())
