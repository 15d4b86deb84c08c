import pytest

from benchmarks.gpu.timing import repetitions, sets_beyond_cache


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
