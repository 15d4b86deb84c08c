from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch

from benchmarks.gpu import timing
from benchmarks.gpu.timing import repetitions, sets_beyond_cache, side_stream


@pytest.mark.parametrize(
    ("size", "sets"), [(60_000_000, 3), (59_999_999, 4), (1_000_000, 180), (10**9, 2), (0, 180_000_000)]
)
def test_all_sets_together_exceed_the_cache(size, sets):
    assert sets_beyond_cache(size, 60_000_000) == sets
    assert sets * max(1, size) >= 180_000_000


@pytest.mark.parametrize(("seconds", "times"), [(1.0, 1), (1e-3, 1), (0.9e-3, 2), (1e-5, 100)])
def test_a_sample_is_long_enough(seconds, times):
    assert repetitions(seconds) == times
    assert repetitions(0.0) >= 1000


def test_all_is_measured_on_one_stream(monkeypatch):
    """Libraries keep memory for every stream that they are used on."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", Mock(side_effect=lambda device: Mock()))
    timing._stream.cache_clear()
    with side_stream() as first:
        pass
    with side_stream() as second:
        pass
    timing._stream.cache_clear()
    assert first is second
