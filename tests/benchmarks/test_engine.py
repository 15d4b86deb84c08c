from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import test_engine
from benchmarks.contenders import CONTENDERS, FORWARD, SELDOM, STORED
from benchmarks.engine_workloads import Block, Workload
from benchmarks.test_engine import of_times, rounds_in_words, timed
from benchmarks.timing import FEWEST


def transform():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


SMALL = Workload("small", lambda: Block(transform(), transform()), (64, 6), 1, (4, 8), "small")
NAMED = {c.name: c for c in CONTENDERS}


@pytest.mark.parametrize(
    ("seconds", "most", "rounds"),
    [(100.0, 15, FEWEST), (0.5, 15, 8), (0.5, 4, 4), (0.01, 15, 15)],
)
def test_there_are_as_many_rounds_as_fit_and_every_contender_is_in_one(monkeypatch, seconds, most, rounds):
    """A step of so many seconds."""
    order, now = [], [0.0]

    def step(model, x, weight):
        order.append(model)
        now[0] += seconds
        return seconds

    monkeypatch.setattr("benchmarks.timing.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(test_engine, "step_seconds", step)
    monkeypatch.setattr(test_engine, "SECONDS", 30)
    often, seldom = [STORED, NAMED["RevTorch"], NAMED["revgrad float"]], NAMED["memcnn"]
    found = timed({c: c for c in (*often, seldom)}, *SMALL.build(1), 2, most)
    assert len(found) == rounds
    assert [seldom in times for times in found] == [i % SELDOM == 0 for i in range(rounds)]
    assert all(times == dict.fromkeys(times, seconds) and set(often) <= set(times) for times in found)
    assert order[::2] == order[1::2] == [c for times in found for c in times]  # two steps in a row
    assert order[:16:2] == [*often, seldom, *often[1:], often[0], *often[2:]][:8]
    rows = of_times(found)
    assert {c: row["rounds"] for c, row in rows.items()} == dict.fromkeys(often, rounds) | {
        seldom: len(range(0, rounds, SELDOM))
    }
    assert all(("p20" in row) == ("p80" in row) == (row["rounds"] >= FEWEST) for row in rows.values())


@pytest.mark.usefixtures("single_thread")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_every_contender_takes_a_step_before_the_rounds(monkeypatch):
    depth, ran = SMALL.depths[0], []
    counted, timed = test_engine.counted, test_engine.timed
    monkeypatch.setattr(test_engine, "counted", lambda *how: ran.append(how[0]) or counted(*how))
    monkeypatch.setattr(test_engine, "timed", lambda *how: ran.append("rounds") or timed(*how))
    few = [STORED, NAMED["checkpoint per block"], *(c for c in CONTENDERS if c.ours)]
    monkeypatch.setattr(test_engine, "CONTENDERS", few)
    monkeypatch.setattr(test_engine, "ROUNDS", {(SMALL, depth): 1})
    monkeypatch.setattr(test_engine, "PEAK_MIB", {SMALL: 1})
    benchmark = SimpleNamespace(disabled=False, pedantic=lambda run, arguments, rounds: run(*arguments))
    rows = defaultdict(dict)
    test_engine.test_stack(benchmark, rows, SMALL, depth)
    assert ran == [*few, "rounds"]
    assert [rows[SMALL, depth, c]["rounds"] for c in few] == [1] * len(few)
    assert rounds_in_words(rows) == f"Rounds by stack: small, {depth} blocks: 1."


def test_ratios_are_within_a_round_and_over_the_fastest_peer():
    ours, fast, slow = NAMED["revgrad float"], NAMED["RevTorch"], NAMED["memcnn"]
    assert slow.seldom
    rounds = [{STORED: 1.0, ours: 2.0, fast: 1.0, slow: 4.0}, *({STORED: 2.0, ours: 6.0, fast: 2.0} for _ in range(2))]
    found = of_times(rounds)
    assert list(found) == [STORED, slow, fast, ours]
    assert found[ours] == {"time_ratio": 3.0, "seconds": 6.0, "rounds": 3, "p20": pytest.approx(2.4), "p80": 3.0} | {
        "over_fastest_peer": 3.0,
        "fastest_peer": "RevTorch",
    }
    assert found[slow] == {"time_ratio": 4.0, "seconds": 4.0, "rounds": 1}


def test_two_evaluations_take_a_forward_pass_more_than_one():
    ours, peer = NAMED["revgrad float"], NAMED["RevTorch"]
    found = of_times([{STORED: 2.0, ours: 3.0, peer: 3.0, FORWARD: t} for t in (0.5, 1.0, 0.8)])
    assert {c: row.get("two_evaluations") for c, row in found.items()} == {STORED: None, ours: 1.4, peer: 1.4}


def test_forward_passes_alone_have_no_graph():
    stack, x = SMALL.build(1)
    graphs = []

    def model(x):
        graphs.append(torch.is_grad_enabled())
        return x * 2

    found = timed({STORED: model, FORWARD: model}, stack, x, 2, 1)
    assert [set(times) for times in found] == [{STORED, FORWARD}]
    assert graphs == [True, True, False, False]
