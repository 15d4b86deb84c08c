"""Where no graph is recorded for now, but will be: nothing may be kept or computed that would be otherwise with one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils import parametrize


@contextmanager
def uncached() -> Iterator[None]:
    """Autocast and `parametrize.cached` must not cache casts and weights made here without a graph: stored layers in
    the same region would use them.
    """
    before = torch.is_autocast_cache_enabled(), parametrize._cache_enabled
    torch.set_autocast_cache_enabled(False)
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before[0])
        parametrize._cache_enabled = before[1]


@contextmanager
def graphless() -> Iterator[None]:
    """`uncached`, and modules take no shortcut that computes other values: transformers in eval mode have one."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with uncached():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
