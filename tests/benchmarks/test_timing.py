import gc
import time
from types import SimpleNamespace

import pytest

from benchmarks import timing
from benchmarks.timing import FEWEST, no_collector, processor_seconds, ratios, rotated, rounds_within


def test_every_variant_is_first_in_turn():
    names = ["a", "b", "c"]
    assert [rotated(names, i)[0] for i in range(4)] == ["a", "b", "c", "a"]
    assert all(sorted(rotated(names, i)) == names for i in range(4))
    assert rotated([], 5) == []


def test_ratios_are_taken_within_a_round():
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


def test_the_collector_is_off_and_then_on_again():
    with no_collector():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), no_collector():
        raise KeyError
    assert gc.isenabled()


def test_seconds_are_processor_time_without_the_collector():
    found = []
    assert processor_seconds(lambda: (time.sleep(0.2), found.append(gc.isenabled()))) < 0.1
    assert found == [False]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("each", "most", "rounds"),
    [(1.0, 15, 10), (1.0, 4, 4), (3.0, 15, 3), (3.4, 15, FEWEST), (100.0, 15, FEWEST), (100.0, 1, 1)],
)
def test_as_many_rounds_as_fit(monkeypatch, each, most, rounds):
    """Into ten seconds."""
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def run_round(number):
        now[0] += each
        return number

    assert rounds_within(run_round, 10.0, most) == list(range(rounds))
