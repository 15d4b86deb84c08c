"""Hooks on saved tensors (`torch.autograd.graph.save_on_cpu`), where a backward pass runs inside their context.

The graph of a second evaluation lives only until it has been differentiated: moving what it saves elsewhere and back
takes time for nothing. And a hook that returns the tensor that it is given ties a node to itself, so that a graph of
which nothing is differentiated would stay for good.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch._C._autograd import (
    _pop_saved_tensors_default_hooks,
    _push_saved_tensors_default_hooks,
    _top_saved_tensors_default_hooks,
)


def hooked() -> bool:
    """Whether there are such hooks."""
    return _top_saved_tensors_default_hooks(False) is not None


@contextmanager
def unhooked() -> Iterator[None]:
    """None of the hooks of now."""
    hooks = []
    while (top := _top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(top)
        _pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            _push_saved_tensors_default_hooks(pack, unpack)
