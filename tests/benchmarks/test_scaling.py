import torch
from torch import nn

from benchmarks import test_scaling
from benchmarks.test_scaling import LARGE, ROUNDS, VARIANTS, timed_rounds, training_steps
from crevnet.model import CrevNetConfig


def run(seconds):
    """The order in which three steps of so many seconds run, and the rounds that count."""
    order = []
    rounds = timed_rounds({name: lambda name=name: order.append(name) or seconds for name in "abc"})
    return "".join(order), rounds


def test_a_round_that_does_not_count_comes_first_and_the_order_rotates():
    order, rounds = run(1.0)
    assert ROUNDS == 2
    assert order == "abc" + "bca" + "cab"
    assert rounds == [{"a": 1.0, "b": 1.0, "c": 1.0}] * ROUNDS


def test_what_takes_long_runs_in_one_round_after_it():
    order, rounds = run(LARGE / 3 + 0.1)
    assert order == "abc" + "bca"
    assert len(rounds) == 1
    assert len(run(LARGE / 3 - 0.1)[1]) == ROUNDS


def test_weights_are_laid_out_as_the_trainer_does_it(monkeypatch):
    models = []
    monkeypatch.setattr(test_scaling, "training_step", lambda model, clips: models.append(model))
    for step in training_steps(CrevNetConfig(image_size=16, blocks=(1, 1, 1), modules=2), 1).values():
        step()
    assert len(models) == len(VARIANTS)
    weights = [m.weight for m in models[0].modules() if isinstance(m, nn.Conv3d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last_3d) for w in weights)
    assert not all(w.is_contiguous() for w in weights)
