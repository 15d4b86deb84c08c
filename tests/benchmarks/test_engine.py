from collections import defaultdict

import pytest
from torch import nn

from benchmarks import test_engine
from benchmarks.engine_workloads import Block, Workload

SMALL = Workload("small", lambda: Block(nn.Linear(3, 3), nn.Linear(3, 3)), (64, 6), 1, (2, 3), "small")


@pytest.mark.usefixtures("single_thread")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("depth", SMALL.depths)
def test_a_round_that_does_not_count_comes_before_those_that_do(monkeypatch, rehearsal, depth):
    monkeypatch.setattr(test_engine, "ROUNDS", {(SMALL, depth): 5})
    test_engine.test_step_time(rehearsal, defaultdict(dict), SMALL, depth)
    assert rehearsal.asked == {"rounds": 5, "warmup_rounds": 1}
