"""Where no graph is recorded for now, but will be: nothing may be kept or computed that would be otherwise with one."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.nn.utils import parametrize


class Uncached(AbstractContextManager[None]):
    """Autocast and `parametrize.cached` must not cache casts and weights made here without a graph: stored layers in
    the same region would use them.
    """

    __slots__ = ("_autocast", "_regions")

    def __enter__(self) -> None:
        self._autocast, self._regions = torch.is_autocast_cache_enabled(), parametrize._cache_enabled
        torch.set_autocast_cache_enabled(False)
        # It counts the regions of all threads: they are taken away and given back, never set.
        parametrize._cache_enabled -= self._regions

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_cache_enabled(self._autocast)
        parametrize._cache_enabled += self._regions


class _NoFastPath:
    """No transformer takes its fast path, a setting of the whole process: the first thread that enters switches it off,
    the last that leaves puts back what the first found. Each putting back what it found itself would leave the path off
    for good where two threads overlap.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.within = 0
        self.before = True

    def __enter__(self) -> None:
        with self.lock:
            if not self.within:
                self.before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            self.within += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.within -= 1
            if not self.within:
                torch.backends.mha.set_fastpath_enabled(self.before)


_NO_FAST_PATH = _NoFastPath()


@contextmanager
def graphless() -> Iterator[None]:
    """`Uncached`, and modules take no shortcut that computes other values: transformers in eval mode have one. What
    they differentiate themselves in forward mode is differentiated, which an autograd Function switches off.
    """
    with _NO_FAST_PATH, Uncached(), _set_fwd_grad_enabled(True):
        yield
