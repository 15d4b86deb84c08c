import pytest

from benchmarks.test_training_step import FEW, ROUNDS, report

MEASURED = {"cell": "stlstm", "variant": "stored float", "speedup": 1.4, "p20": 1.3, "p80": 1.5}


@pytest.mark.parametrize("batch", ROUNDS)
def test_few_rounds_have_no_percentiles(batch):
    found = report([{**MEASURED, "batch": batch}], [])
    (row,) = found.tables["rows"].rows
    known = (1.3, 1.5) if ROUNDS[batch] >= FEW else (None, None)
    assert (row["p20"], row["p80"]) == known
    assert row["speedup"] == 1.4
    assert ("1.30" in found.tables["rows"].to_markdown()) == (ROUNDS[batch] >= FEW)


def test_some_batch_has_few_rounds_and_some_has_not():
    assert min(ROUNDS.values()) < FEW <= max(ROUNDS.values())
