from functools import partial

import pytest

from benchmarks import test_training_step
from benchmarks.test_training_step import NOTES, ROUNDS, report
from benchmarks.timing import FEWEST
from crevnet.model import CrevNetConfig

MEASURED = {"cell": "stlstm", "variant": "stored float", "speedup": 1.4, "p20": 1.3, "p80": 1.5}


@pytest.mark.parametrize("batch", ROUNDS)
def test_few_rounds_have_no_percentiles(batch):
    found = report([{**MEASURED, "batch": batch}], [])
    (row,) = found.tables["rows"].rows
    known = (1.3, 1.5) if ROUNDS[batch] >= FEWEST else (None, None)
    assert (row["p20"], row["p80"]) == known
    assert row["speedup"] == 1.4
    assert ("1.30" in found.tables["rows"].to_markdown()) == (ROUNDS[batch] >= FEWEST)


def test_some_batch_has_few_rounds_and_some_has_not():
    assert min(ROUNDS.values()) < FEWEST <= max(ROUNDS.values())


def test_the_notes_say_how_many_rounds_there_are():
    assert "6 rounds of batch 1, 3 rounds of batch 4, 3 rounds of batch 16, 1 round of batch 64;" in " ".join(NOTES)


@pytest.mark.parametrize("batch", ROUNDS)
def test_a_round_that_does_not_count_comes_before_those_that_do(monkeypatch, rehearsal, batch):
    small = partial(CrevNetConfig, image_size=8, blocks=(1,), modules=1, clip=1)
    monkeypatch.setattr(test_training_step, "CrevNetConfig", small)
    test_training_step.test_beside_plain_pytorch(rehearsal, {}, "convlstm", batch)
    assert rehearsal.asked == {"rounds": ROUNDS[batch], "warmup_rounds": 1}
