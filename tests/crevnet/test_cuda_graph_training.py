"""Runs whose training step is a graph."""

import copy
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

import crevnet.cuda_graph
from crevnet.cuda_graph import check_possible
from crevnet.launch import launch
from crevnet.models import MODELS
from crevnet.training import Trainer
from crevnet.training_step import TrainingDiverged
from revgrad import DeferredChecks
from tests.crevnet.test_cuda_graph import Recorded, backward, broken, clips_for, run_again

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the trainer replay what was recorded on a CPU."""
    monkeypatch.setattr(crevnet.cuda_graph, "captured", Recorded)
    monkeypatch.setattr("crevnet.training.check_possible", lambda *args: None)


@pytest.mark.parametrize("model", [{"model.clips_at_once": 3}, {"model.mode": "stored"}])
def test_a_run_with_a_graph_trains_as_without(train_tiny, tiny, on_cpu, model):
    options = model | {"steps": 4, "optimiser.clip_norm": 1.0, "optimiser.warmup_steps": 3}
    plain = train_tiny(options)
    replayed = train_tiny(options | {"run.cuda_graph": True})
    for name in ("loss", "gradient_norm", "learning_rate"):
        expected = list(map(float, tiny.column(plain, name)))
        assert list(map(float, tiny.column(replayed, name))) == pytest.approx(expected, rel=1e-4)  # Adam rounds


def test_a_run_with_a_graph_goes_on_bit_for_bit(train_tiny, tiny, on_cpu, tmp_path):
    options = {"run.cuda_graph": True, "run.checkpoint_every": 2, "optimiser.schedule": "constant"}
    whole = train_tiny(options | {"steps": 4})
    parts = train_tiny(options | {"steps": 2}, folder=tmp_path / "parts")
    train_tiny(options | {"steps": 4}, folder=parts)
    tiny.assert_equal(tiny.weights(parts, 4), tiny.weights(whole, 4))


def test_an_engine_that_loses_its_way_stops_a_run_with_a_graph(tiny, tmp_path, on_cpu, monkeypatch):
    monkeypatch.setattr(crevnet.cuda_graph, "captured", run_again)
    config = tiny.config(tmp_path, {"run.cuda_graph": True})
    trainer = Trainer(config, launch(config), tmp_path)
    frames = config.data.build_train().batch(range(2))
    trainer._train_step(frames)
    before = copy.deepcopy(trainer.raw_model.state_dict())
    broken(trainer.raw_model)
    with pytest.raises(TrainingDiverged, match=r"^step 2: .*(residue|recovered)"):
        trainer._train_step(frames)
    tiny.assert_equal(trainer.raw_model.state_dict(), before)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_names_its_parameter(tiny, tmp_path, on_cpu, clip_norm):
    """Of the others, none is spoilt by clipping."""
    options = {"run.cuda_graph": True, "model.mode": "stored", "optimiser.clip_norm": clip_norm}
    config = tiny.config(tmp_path, options)
    trainer = Trainer(config, launch(config), tmp_path)
    weight = trainer.raw_model.predictor[0].transform.attention[2].weight
    wrong = torch.zeros(())
    weight.register_hook(lambda grad: grad + wrong)
    frames = config.data.build_train().batch(range(2))
    trainer._train_step(frames)
    wrong.fill_(math.nan)
    name = next(name for name, p in trainer.raw_model.named_parameters() if p is weight)
    with pytest.raises(TrainingDiverged, match=rf"step 2: the gradient is not finite, first in {name} \(1 param"):
        trainer._train_step(frames)


@pytest.mark.parametrize(
    ("options", "processes", "message"),
    [
        ({}, 2, "is for one process, and this run has 2"),
        ({"feeding.kind": "scheduled", "feeding.fall_to": 3}, 1, "feeding.kind 'scheduled'"),
        ({"model.offload": True}, 1, "set model.offload to false"),
        ({"model.mode": "checkpoint"}, 1, "which sets random states: choose another"),
        ({"run.memory": "1 GiB"}, 1, "which run.memory does not count"),
    ],
)
def test_what_cannot_be_captured_is_named(tiny, options, processes, message):
    cuda = torch.device("cuda")
    check_possible(tiny.config(None, {}), cuda, 1)
    with pytest.raises(ValueError, match=rf"^run.cuda_graph .*{message}"):
        check_possible(tiny.config(None, options), cuda, processes)


def test_there_is_no_graph_on_a_cpu(train_tiny):
    with pytest.raises(ValueError, match=r"run.cuda_graph needs a CUDA device, and this run is on cpu"):
        train_tiny({"run.cuda_graph": True})


@pytest.mark.parametrize("name", [name for name in MODELS if name != "crevnet"])
def test_no_other_model_waits_either(name):
    config = MODELS[name](image_size=16)
    model, clips = config.build(), clips_for(config, 1, 2)
    checks = DeferredChecks()
    with checks.measuring():
        backward(model, clips, None)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, checks:
        backward(model, mode.from_tensor(clips), None)
