from functools import partial

import pytest
import torch

from benchmarks import test_training_step
from benchmarks.plain_crevnet import PlainCrevNet
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


@pytest.fixture
def small(monkeypatch):
    """Measures a small model."""
    config = partial(CrevNetConfig, image_size=8, blocks=(1,), modules=1, clip=1)
    monkeypatch.setattr(test_training_step, "CrevNetConfig", config)


@pytest.mark.parametrize("batch", ROUNDS)
def test_a_round_that_does_not_count_comes_before_those_that_do(small, rehearsal, batch):
    test_training_step.test_beside_plain_pytorch(rehearsal, {}, "convlstm", batch)
    assert rehearsal.asked == {"rounds": ROUNDS[batch], "warmup_rounds": 1}


def test_weights_are_laid_out_as_the_trainer_does_it_but_those_of_the_plain_model(monkeypatch, small, rehearsal):
    made = []

    def plain_model(model):
        made.extend([model, PlainCrevNet(model)])
        return made[-1]

    monkeypatch.setattr(test_training_step, "PlainCrevNet", plain_model)
    test_training_step.test_beside_plain_pytorch(rehearsal, {}, "convlstm", 1)
    model, plain = map(wide, made)
    assert model
    assert plain
    assert all(w.is_contiguous(memory_format=torch.channels_last_3d) and not w.is_contiguous() for w in model)
    assert all(w.is_contiguous() for w in plain)


def wide(model):
    """The weights of convolutions to which layouts make a difference."""
    return [w for w in model.parameters() if w.ndim == 5 and w.shape[1] > 1 and w[0, 0].numel() > 1]
