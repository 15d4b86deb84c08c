from collections import defaultdict
from types import SimpleNamespace

import pytest
from torch import nn

from benchmarks import test_engine
from benchmarks.contenders import CONTENDERS, SELDOM, STORED
from benchmarks.engine_workloads import Block, Workload
from benchmarks.test_engine import of_times, rounds_in_words
from benchmarks.timing import FEWEST


def transform():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


SMALL = Workload("small", lambda: Block(transform(), transform()), (64, 6), 1, (4, 8), "small")


@pytest.fixture
def stack(monkeypatch):
    """Measures the small stack of so many blocks in rounds of so many seconds; its rows, and what ran in turn."""

    def measure(depth, seconds, most=15):
        ran, now = [], [0.0]

        def step_seconds(model, x, weight):
            ran.append("timed")
            return 1.0

        def rounds(run_round, limit, most):
            def timed_round(number):
                found = run_round(number)
                now[0] += seconds
                return found

            return real(timed_round, limit, most)

        real, count = test_engine.rounds_within, test_engine.counted
        monkeypatch.setattr("benchmarks.timing.time", SimpleNamespace(perf_counter=lambda: now[0]))
        monkeypatch.setattr(test_engine, "rounds_within", rounds)
        monkeypatch.setattr(test_engine, "step_seconds", step_seconds)
        monkeypatch.setattr(test_engine, "counted", lambda *how: ran.append("counted") or count(*how))
        monkeypatch.setattr(test_engine, "ROUNDS", {(SMALL, depth): most})
        monkeypatch.setattr(test_engine, "PEAK_MIB", {SMALL: 1})
        benchmark = SimpleNamespace(disabled=False, pedantic=lambda run, arguments, rounds: run(*arguments))
        rows = defaultdict(dict)
        test_engine.test_stack(benchmark, rows, SMALL, depth)
        return rows, ran

    return measure


@pytest.mark.usefixtures("single_thread")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(("seconds", "most", "rounds"), [(100.0, 15, FEWEST), (5.0, 15, 6), (5.0, 4, 4), (0.1, 15, 15)])
@pytest.mark.parametrize("depth", SMALL.depths)
def test_there_are_as_many_rounds_as_fit_and_every_contender_is_in_one(stack, depth, seconds, most, rounds):
    rows, ran = stack(depth, seconds, most)
    working = [c for c in CONTENDERS if "error" not in rows[SMALL, depth, c]]
    assert STORED in working
    for contender in working:
        row = rows[SMALL, depth, contender]
        number = len(range(0, rounds, SELDOM)) if contender.seldom else rounds
        assert row["rounds"] == number >= 1
        assert row["time_ratio"] == 1
        assert ("p20" in row) == ("p80" in row) == (number >= FEWEST)
    assert rounds_in_words(rows) == f"Rounds by stack: small, {depth} blocks: {rounds}."
    # Every contender takes a step before the first that is timed, and of the shallowest stack two a round.
    steps = sum(rows[SMALL, depth, c]["rounds"] for c in working) * (1 + (depth == SMALL.depths[0]))
    assert ran == ["counted"] * len(working) + ["timed"] * steps


def test_ratios_are_within_a_round_and_over_the_fastest_peer():
    names = {c.name: c for c in CONTENDERS}
    ours, fast, slow = names["revgrad float"], names["RevTorch"], names["memcnn"]
    assert slow.seldom
    rounds = [{STORED: 1.0, ours: 2.0, fast: 1.0, slow: 4.0}, *({STORED: 2.0, ours: 6.0, fast: 2.0} for _ in range(2))]
    found = of_times(rounds)
    assert list(found) == [STORED, slow, fast, ours]
    assert found[ours] == {"time_ratio": 3.0, "seconds": 6.0, "rounds": 3, "p20": pytest.approx(2.4), "p80": 3.0} | {
        "over_fastest_peer": 3.0,
        "fastest_peer": "RevTorch",
    }
    assert found[slow] == {"time_ratio": 4.0, "seconds": 4.0, "rounds": 1}
