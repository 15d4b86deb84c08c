"""The same run again, bit for bit: repeated, longer, or gone on with after it stopped."""

import json
import shutil

import pytest
import torch

from crevnet.checkpoint import DamagedCheckpoint
from crevnet.checkpoint_directory import CheckpointDirectory
from crevnet.command import load_config
from crevnet.evaluate import evaluate
from crevnet.training import train
from tests.crevnet.test_training import snapshot, training_batch

pytestmark = pytest.mark.usefixtures("single_thread")


# --- the same again ---


def test_the_written_configuration_repeats_the_run_bit_for_bit(train_tiny, tiny, tmp_path):
    options = tiny.scheduled | {"steps": 4, "feeding.fall_to": 4, "run.validate_every": 3}
    first = train_tiny(options)
    config = load_config(first / "config.yaml")
    assert config == tiny.config(first, options)
    config.run.folder = tmp_path / "again"
    torch.manual_seed(99)  # what was drawn before must not matter
    train(config)
    tiny.assert_equal(tiny.weights(tmp_path / "again", 4), tiny.weights(first, 4))
    assert tiny.column(tmp_path / "again", "loss") == tiny.column(first, "loss")
    same = ("mse", "ssim", "psnr", "per_frame", "copy_last_frame", "peak_activation_bytes")
    first_metrics, again = (json.loads((f / "metrics.json").read_text()) for f in (first, tmp_path / "again"))
    assert [again[k] for k in same] == [first_metrics[k] for k in same]


def test_another_seed_is_another_run(trainer):
    made = [trainer(options) for options in ({}, {"seed": 1}, {"data.seed": 1})]
    assert len({t._train_step(training_batch(t))[0] for t in made}) == 3


def test_how_often_it_looks_up_does_not_change_the_weights(train_tiny, tiny):
    often = {"run.checkpoint_every": 1, "run.validate_every": 1, "run.log_every": 1}
    seldom = {"run.checkpoint_every": 100, "run.validate_every": 100, "run.log_every": 100}
    one, other = (tiny.weights(train_tiny({"steps": 3} | o), 3) for o in (often, seldom))
    tiny.assert_equal(one, other)


# --- going on ---


def test_a_longer_run_in_the_same_folder_goes_on_and_is_the_run_in_one_go(train_tiny, tiny, capsys):
    options = {"feeding.kind": "scheduled", "feeding.fall_to": 6, "run.keep": 9}
    straight = train_tiny(options | {"steps": 5})
    folder = train_tiny(options | {"steps": 3})
    capsys.readouterr()
    train_tiny(options | {"steps": 5}, folder)
    assert f"Going on from step 3 in {folder}" in capsys.readouterr().out
    tiny.assert_equal(tiny.weights(folder, 5), tiny.weights(straight, 5))
    assert [int(s) for s in tiny.column(folder, "step")] == list(range(1, 6))
    assert tiny.column(folder, "loss") == tiny.column(straight, "loss")
    one, other = (tiny.state(f, 5)["optimiser"]["state"] for f in (folder, straight))
    for i in one:
        tiny.assert_equal(one[i], other[i])


def test_a_run_without_steps_can_be_evaluated_and_made_longer(train_tiny, tiny):
    straight = train_tiny({"steps": 2})
    folder = train_tiny({"steps": 0})
    measured = json.loads((folder / "metrics.json").read_text())
    assert evaluate(folder, device="cpu")["mse"] == pytest.approx(measured["mse"], rel=1e-6)
    train_tiny({"steps": 2}, folder)
    tiny.assert_equal(tiny.weights(folder, 2), tiny.weights(straight, 2))


def test_a_run_that_is_not_to_be_made_shorter_is_left_as_it_is(train_tiny):
    folder = train_tiny({"steps": 3})
    before = snapshot(folder)
    with pytest.raises(ValueError, match="has reached step 3, and steps is 1"):
        train_tiny({"steps": 1}, folder)
    assert snapshot(folder) == before


def test_a_finished_run_is_only_measured_again(train_tiny, tiny):
    folder = train_tiny({"steps": 2})
    before = snapshot(folder / "checkpoints")
    (folder / "metrics.json").unlink()
    train_tiny({"steps": 2}, folder)
    assert snapshot(folder / "checkpoints") == before
    assert tiny.column(folder, "step") == ["1", "2"]
    assert (folder / "metrics.json").exists()


def test_a_damaged_checkpoint_is_passed_over_loudly_for_the_same_result(train_tiny, tiny, finished_run, tmp_path):
    """The run in one go, cut back to its last checkpoints; the newest of them is damaged."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    for name in ("metrics.json", "predictions.png"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000024")
    (folder / "checkpoints" / "best.json").unlink()  # it may name the one that was just removed
    damaged = folder / "checkpoints" / "step-00000022" / "weights.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(data)
    with pytest.warns(RuntimeWarning, match=r"passing over a damaged checkpoint.*step-00000022/weights.safetensors"):
        train_tiny(tiny.scheduled, folder, pictures=True)
    tiny.assert_equal(tiny.weights(folder, 24), tiny.weights(finished_run, 24))
    assert [int(s) for s in tiny.column(folder, "step")] == list(range(1, 25))
    assert tiny.column(folder, "loss") == tiny.column(finished_run, "loss")
    assert (folder / "metrics.json").exists()
    assert (folder / "predictions.png").exists()


def test_if_all_checkpoints_are_damaged_nothing_is_overwritten(train_tiny):
    folder = train_tiny({"steps": 2})
    for weights in folder.glob("checkpoints/step-*/weights.safetensors"):
        weights.write_bytes(b"damage")
    before = snapshot(folder / "checkpoints")
    with pytest.warns(RuntimeWarning), pytest.raises(DamagedCheckpoint, match=r"all checkpoints in .* are damaged"):
        train_tiny({"steps": 4}, folder)
    assert snapshot(folder / "checkpoints") == before


@pytest.fixture
def run_with_a_damaged_best(train_tiny):
    """Its folder: two steps, of which the first one is the best, and damaged."""
    folder = train_tiny({"steps": 2})
    directory = CheckpointDirectory(folder / "checkpoints")
    found = directory.load(2)
    directory.save(1, found.weights, {**found.state, "step": 1, "best_mse": 0.5}, best=True)
    directory.save(2, found.weights, {**found.state, "best_mse": 0.5})
    (folder / "checkpoints" / "step-00000001" / "weights.safetensors").write_bytes(b"damage")
    (folder / "metrics.json").unlink()
    return folder


PASSED_OVER = r"passing over a damaged checkpoint: .*step-00000001/weights.safetensors"


def test_a_damaged_best_checkpoint_is_reported_and_the_newest_intact_one_measured(run_with_a_damaged_best, train_tiny):
    folder = run_with_a_damaged_best
    before = snapshot(folder / "checkpoints")
    with pytest.warns(RuntimeWarning, match=PASSED_OVER):
        train_tiny({"steps": 2}, folder, pictures=True)
    assert json.loads((folder / "metrics.json").read_text())["step"] == 2
    assert (folder / "predictions.png").exists()
    assert snapshot(folder / "checkpoints") == before


def test_after_a_damaged_best_checkpoint_a_worse_validation_is_the_best(run_with_a_damaged_best, train_tiny, tiny):
    """Nothing comes near an error of 0.5 within a step."""
    folder = run_with_a_damaged_best
    with pytest.warns(RuntimeWarning, match=PASSED_OVER):
        train_tiny({"steps": 3}, folder)
    assert CheckpointDirectory(folder / "checkpoints").best().step == 3
    assert tiny.state(folder, 3)["best_mse"] == pytest.approx(float(tiny.column(folder, "mse", "validation")[-1]))
    assert json.loads((folder / "metrics.json").read_text())["step"] == 3


def test_an_intact_best_checkpoint_stays_the_best_over_a_resumption(train_tiny, tiny):
    folder = train_tiny({"steps": 1})
    directory = CheckpointDirectory(folder / "checkpoints")
    found = directory.load(1)
    directory.save(1, found.weights, {**found.state, "best_mse": 0.5}, best=True)
    train_tiny({"steps": 2}, folder)
    assert directory.best().step == 1
    assert tiny.state(folder, 2)["best_mse"] == 0.5


# --- from the weights of another run ---


@pytest.mark.parametrize("name", ["", "checkpoints/step-00000002"])
def test_a_run_begins_with_the_weights_of_another(name, train_tiny, tiny, capsys):
    source = train_tiny({"steps": 3, "run.checkpoint_every": 2})
    best = CheckpointDirectory(source / "checkpoints").best().step
    step = 2 if name else best
    capsys.readouterr()
    folder = train_tiny({"steps": 0, "run.init": source / name, "seed": 7})
    assert f"\nBeginning with the weights of step {step} in {source / name}\n" in capsys.readouterr().out
    tiny.assert_equal(tiny.weights(folder, 0), tiny.weights(source, step))
    assert load_config(folder / "config.yaml").run.init == source / name


def test_it_goes_on_from_its_own_checkpoint_where_the_other_run_is_gone(train_tiny, tiny, capsys):
    source = train_tiny({"steps": 1})
    options = {"run.init": source, "seed": 7}
    straight = train_tiny(options | {"steps": 3})
    folder = train_tiny(options | {"steps": 1})
    shutil.rmtree(source)
    capsys.readouterr()
    train_tiny(options | {"steps": 3}, folder)
    assert "Beginning with" not in capsys.readouterr().out
    tiny.assert_equal(tiny.weights(folder, 3), tiny.weights(straight, 3))
    with pytest.raises(ValueError, match=rf"run.init was {source}, is None"):
        train_tiny({"steps": 3, "seed": 7}, folder)
    with pytest.raises(FileNotFoundError, match=rf"run.init {source} is neither the folder of a run"):
        train_tiny(options | {"steps": 3})


def test_a_run_of_another_architecture_is_none_to_begin_with(train_tiny, tmp_path):
    source = train_tiny({"steps": 0, "model.modules": 3})
    with pytest.raises(
        ValueError, match=rf"run.init {source} is of another architecture: predictor\.layers\.2\.\S+ is \["
    ):
        train_tiny({"steps": 1, "run.init": source}, tmp_path / "run")
    assert not list(tmp_path.glob("run/checkpoints/step-*"))


# --- the folder ---


def test_another_configuration_in_the_same_folder_is_refused_by_name(train_tiny, tiny):
    folder = train_tiny({"steps": 1})
    before = snapshot(folder)
    with pytest.raises(ValueError, match=r"holds a run with other options") as error:
        train_tiny({"steps": 1, "optimiser.learning_rate": 0.125, "model.modules": 3}, folder)
    assert str(folder) in str(error.value)
    assert "model.modules was 2, is 3" in str(error.value)
    assert "optimiser.learning_rate was 0.0005, is 0.125" in str(error.value)
    assert "steps was" not in str(error.value)
    assert snapshot(folder) == before
