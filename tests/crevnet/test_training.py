import errno
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import crevnet.training
from crevnet.baselines.predrnn import PredRNNConfig
from crevnet.checkpoint_directory import CheckpointDirectory
from crevnet.command import load_config
from crevnet.config import TrainConfig
from crevnet.machine import trained_on
from crevnet.training import summary
from crevnet.training_step import TrainingDiverged

pytestmark = pytest.mark.usefixtures("single_thread")


def snapshot(folder):
    """Every file below a folder, with its content."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def training_batch(trainer, batch_size=2):
    return trainer.config.data.build_train().batch(range(batch_size))


# --- a run from start to end ---


def test_metrics_are_written_with_everything_that_is_promised(finished_run):
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert set(metrics) == {
        "mse", "mse_per_value", "ssim", "psnr", "per_frame", "sequences", "copy_last_frame", "step", "steps", "seconds",
        "peak_activation_bytes", "way", "trained_on", "parameters", "data", "data_range",
    }  # fmt: skip
    assert set(metrics["copy_last_frame"]) == {"mse", "mse_per_value", "ssim", "psnr"}
    assert {k: len(v) for k, v in metrics["per_frame"].items()} == dict.fromkeys(metrics["copy_last_frame"], 3)
    assert (metrics["sequences"], metrics["steps"], metrics["data_range"]) == (5, 24, 1.0)
    assert metrics["data"] == "digits embedded in scikit-learn"
    weights = load_file(finished_run / "checkpoints" / "step-00000024" / "weights.safetensors")
    assert metrics["parameters"] == sum(x.numel() for x in weights.values())
    assert len(list((finished_run / "tensorboard").iterdir())) == 1  # of the training alone
    assert metrics["seconds"] > 0
    assert metrics["peak_activation_bytes"] > 0
    assert all(math.isfinite(metrics[k]) for k in ("mse", "ssim", "psnr"))


def test_metrics_tell_what_trained_and_not_what_measured(train_tiny, monkeypatch):
    folder = train_tiny({"steps": 1})
    here = trained_on(torch.device("cpu"), 1)
    assert json.loads((folder / "metrics.json").read_text())["trained_on"] == here
    monkeypatch.setattr("crevnet.training.trained_on", lambda *args: here | {"device_name": "another"})
    train_tiny({"steps": 1}, folder)
    assert json.loads((folder / "metrics.json").read_text())["trained_on"] == here
    train_tiny({"steps": 2}, folder)
    assert json.loads((folder / "metrics.json").read_text())["trained_on"]["device_name"] == "another"


def test_the_weights_that_are_reported_are_the_best_by_validation(finished_run, tiny):
    steps = [int(s) for s in tiny.column(finished_run, "step", "validation")]
    errors = [float(e) for e in tiny.column(finished_run, "mse", "validation")]
    assert steps == [10, 20, 24]
    best = steps[errors.index(min(errors))]
    assert json.loads((finished_run / "metrics.json").read_text())["step"] == best
    assert CheckpointDirectory(finished_run / "checkpoints").best().step == best
    assert tiny.state(finished_run, 24)["best_mse"] == pytest.approx(min(errors), rel=1e-6)


def test_pictures_are_written_and_whole(finished_run):
    for name in ("predictions.png", "loss.png"):
        with Image.open(finished_run / name) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 100
    with Image.open(finished_run / "predictions.gif") as image:
        assert image.n_frames == 6
        for i in range(6):
            image.seek(i)
            image.load()


def test_a_test_set_smaller_than_the_picture_grid(train_tiny):
    folder = train_tiny({"steps": 1, "data.test_sequences": 3}, pictures=True)
    assert json.loads((folder / "metrics.json").read_text())["sequences"] == 3
    assert (folder / "predictions.png").exists()


def test_every_step_is_logged_once_with_its_learning_rate(finished_run, tiny):
    assert [int(s) for s in tiny.column(finished_run, "step")] == list(range(1, 25))
    optimiser = load_config(finished_run / "config.yaml").optimiser
    rates = [float(r) for r in tiny.column(finished_run, "learning_rate")]
    assert rates == pytest.approx([optimiser.rate(step, 24) for step in range(24)], rel=1e-6)
    assert rates[0] < rates[2] == 5e-3 > rates[-1]


def test_tensorboard_has_what_the_csv_files_have(finished_run, tiny):
    events = EventAccumulator(str(finished_run / "tensorboard"))
    events.Reload()
    losses = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars("train/loss")]
    assert losses == list(enumerate(map(float, tiny.column(finished_run, "loss")), start=1))
    assert [e.step for e in events.Scalars("validation/mse")] == [10, 20, 24]


def test_a_validation_does_not_measure_copying_the_last_frame(trainer, monkeypatch):
    trainer = trainer()
    monkeypatch.setattr("crevnet.evaluate.copy_last_frame", None)
    assert trainer._validate(trainer.config.data.build_validation(2), None)
    assert 0 < trainer.best_mse < math.inf


def test_logs_and_checkpoints_come_as_often_as_configured(train_tiny, tiny):
    options = {"steps": 7, "run.log_every": 3, "run.checkpoint_every": 2, "run.validate_every": 100, "run.keep": 2}
    folder = train_tiny(options)
    assert tiny.column(folder, "step") == ["3", "6", "7"]
    assert tiny.column(folder, "step", "validation") == ["7"]
    assert CheckpointDirectory(folder / "checkpoints").steps() == [6, 7]


@pytest.mark.parametrize(
    "options",
    [
        {"model.cell": "convlstm"},
        {"model.cell": "stlstm"},
        {"model.cell": "stlstm", "model.stacking": "channels"},
        {"model.cell": "convlstm", "model.stacking": "channels", "model.norm": "batch"},
        {"feeding.kind": "free", "model.keep_states_every": 2},
        {"feeding.kind": "free", "model.cell_states": "inverted", "model.cell": "stlstm"},
        {"model.mode": "checkpoint", "model.arithmetic": "float"},
        {"run.precision": "bf16-mixed", "model.cell": "stlstm"},
        {"run.precision": "bf16-mixed", "model.cell": "stlstm", "model.arithmetic": "float"},
        {"run.precision": "bf16-mixed", "model.cell": "stlstm", "model.mode": "stored"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_training_decreases_the_loss(options, trainer):
    trainer = trainer(options | {"optimiser.learning_rate": 1e-2})
    batch = training_batch(trainer)
    losses = [trainer._train_step(batch)[0] for _ in range(8)]
    assert losses[-1] < 0.85 * losses[0]


def test_a_run_without_steps_measures_the_random_weights(train_tiny):
    folder = train_tiny({"steps": 0}, pictures=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["step"], metrics["peak_activation_bytes"]) == (0, 0)
    assert not (folder / "loss.png").exists()


# --- processes ---


def test_what_the_first_process_cannot_write_ends_all(trainer, monkeypatch):
    def told(fabric, function):
        if function.__name__ != "write":
            return function()
        raise OSError(errno.ENOSPC, "No space left on device", "checkpoints")

    monkeypatch.setattr(crevnet.training, "from_first", told)
    trainer = trainer({"steps": 1})
    for write in (trainer.fit, trainer.finish):
        with pytest.raises(OSError, match="No space left on device: 'checkpoints'"):
            write()


def test_only_rank_0_writes(trainer, monkeypatch):
    monkeypatch.setattr(crevnet.training, "from_first", lambda fabric, function: None)
    trainer = trainer({"steps": 1})
    trainer.main = False
    assert trainer.fit()
    trainer.finish()
    assert not trainer.folder.exists()


def test_metrics_that_cannot_be_written_leave_those_before(train_tiny, monkeypatch):
    folder = train_tiny({"steps": 1})
    before = (folder / "metrics.json").read_bytes()
    write = Path.write_text

    def on_a_full_disk(path, text):
        if "metrics" in path.name:
            write(path, text[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", on_a_full_disk)
    with pytest.raises(OSError, match=r"/metrics\.json'"):
        train_tiny({"steps": 1}, folder)
    assert (folder / "metrics.json").read_bytes() == before


def test_the_summary_has_both_lines_and_their_ratio(tmp_path):
    result = {"mse": 30.0, "ssim": 0.8, "psnr": 20.0, "sequences": 7}
    text = summary(
        TrainConfig(model=PredRNNConfig()),
        result | {"copy_last_frame": {"mse": 60.0, "ssim": 0.5, "psnr": 15.0}},
        tmp_path,
    )
    assert "Test digits never seen in training, 7 sequences" in text
    assert "predrnn               30.00   0.8000    20.00" in text
    assert "60.00   0.5000    15.00" in text
    assert "MSE is 0.50 of copying" in text
    assert str(tmp_path) in text


def test_a_still_test_set_is_copied_perfectly(tmp_path):
    measured = {"mse": 30.0, "ssim": 0.8, "psnr": 20.0, "sequences": 7}
    text = summary(TrainConfig(), measured | {"copy_last_frame": {"mse": 0.0, "ssim": 1.0, "psnr": 100.0}}, tmp_path)
    assert f"\nCopying is perfect: nothing moves in the test set. Metrics, pictures and checkpoints: {tmp_path}" in text


def test_weights_that_break_in_the_last_step_are_found_by_validation(trainer, monkeypatch):
    trainer = trainer({"steps": 1})
    step = trainer.optimiser.step

    def explode():
        step()
        with torch.no_grad():
            for p in trainer.raw_model.parameters():
                p.fill_(math.nan)

    monkeypatch.setattr(trainer.optimiser, "step", explode)
    with pytest.raises(TrainingDiverged, match=r"step 1: validation failed: .*; the last checkpoint is untouched$"):
        trainer.fit()
    assert not list(trainer.folder.glob("checkpoints/step-*"))


def test_where_there_are_checkpoints_a_diverged_run_asks_for_another_folder(trainer, monkeypatch):
    trainer = trainer({"steps": 5, "run.checkpoint_every": 2})
    take = type(trainer)._train_step

    def diverge(trainer, frames):
        if trainer.step == 2:
            raise TrainingDiverged("step 3: the loss is nan. Lower optimiser.learning_rate")
        return take(trainer, frames)

    monkeypatch.setattr(type(trainer), "_train_step", diverge)
    with pytest.raises(TrainingDiverged) as error:
        trainer.fit()
    assert str(error.value) == (
        "step 3: the loss is nan. Lower optimiser.learning_rate; a run with other options needs another run.folder, "
        f"since {trainer.folder} has checkpoints"
    )


@pytest.mark.parametrize("given", [True, False])
def test_an_interrupted_run_says_what_command_goes_on(given, trainer, monkeypatch, capsys):
    trainer = trainer({"steps": 5})
    if not given:
        trainer.config.run.folder = None
    take = type(trainer)._train_step

    def stop(trainer, frames):
        signal.raise_signal(signal.SIGTERM)
        return take(trainer, frames)

    monkeypatch.setattr(type(trainer), "_train_step", stop)
    assert not trainer.fit()
    folder = trainer.folder
    command = "the same command" if given else f"the same command with --run.folder {folder}"
    assert f"Interrupted and saved at step 1 in {folder}: {command} goes on from there.\n" in capsys.readouterr().out
