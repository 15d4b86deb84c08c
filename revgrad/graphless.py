"""Where no graph is recorded for now, but will be: nothing may be kept or computed that would be otherwise with one."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import torch
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.nn.utils import parametrize


class Uncached(AbstractContextManager[None]):
    """Autocast and `parametrize.cached` must not cache casts and weights made here without a graph: stored layers in
    the same region would use them.
    """

    __slots__ = ("_autocast", "_regions")

    def __init__(self) -> None:
        self._autocast = False
        self._regions = 0

    def __enter__(self) -> None:
        self._autocast = torch.is_autocast_cache_enabled()
        self._regions = parametrize._cache_enabled
        # Counts the regions of all threads: taken away and given back, never set.
        parametrize._cache_enabled -= self._regions
        try:
            torch.set_autocast_cache_enabled(False)
        except BaseException:  # Ctrl-C, which Python looks for when the call is over
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        regions, self._regions = self._regions, 0
        parametrize._cache_enabled += regions
        if self._autocast:
            torch.set_autocast_cache_enabled(True)


class _NoFastPath(AbstractContextManager[None]):
    """No transformer takes its fast path, a setting of the whole process: the first thread that enters switches it off,
    the last that leaves puts back what the first found. Each putting back what it found itself would leave the path off
    for good where two threads overlap.
    """

    lock = threading.Lock()
    within: ClassVar[list["weakref.ref[_NoFastPath]"]] = []
    """Weak, since Ctrl-C may come where one is about to leave."""
    before: ClassVar[bool | None] = None
    """What the first found; None where nobody has switched it off."""

    def __enter__(self) -> None:
        kind = _NoFastPath
        with kind.lock:
            kind.within = [*(x for x in kind.within if x() is not None), weakref.ref(self)]
            if kind.before is None:
                kind.before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)

    def __exit__(self, *error: object) -> None:
        kind = _NoFastPath
        with kind.lock:
            kind.within = [x for x in kind.within if x() not in (None, self)]
            if not kind.within and kind.before is not None:
                torch.backends.mha.set_fastpath_enabled(kind.before)
                kind.before = None


@contextmanager
def graphless() -> Iterator[None]:
    """`Uncached`, and modules take no shortcut that computes other values: transformers in eval mode have one. What
    they differentiate themselves in forward mode is differentiated, which an autograd Function switches off.
    """
    uncached = Uncached()
    try:
        with _NoFastPath(), uncached, _set_fwd_grad_enabled(True):
            yield
    except BaseException:  # also one that keeps the context from being left (see `mending.py`)
        uncached.__exit__()
        raise
