import json
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from benchmarks.gpu import train_moving_mnist
from benchmarks.gpu.train_moving_mnist import fit_weights, main, train_for
from benchmarks.reporting import Report, Table
from crevnet.checkpoint_directory import CheckpointDirectory

TINY = [
    "--steps", "2", "--batch_size", "2", "--model.image_size", "32", "--data.image_size", "32",
    "--model.blocks", "[1,1,1]", "--model.modules", "2", "--data.test_sequences", "2",
    "--run.validation_sequences", "2", "--run.threads", "1",
]  # fmt: skip


def test_trains_evaluates_and_keeps_what_matters(tmp_path, capsys):
    out, results = tmp_path / "out", tmp_path / "results"
    arguments = ["--minutes", "9", "--out", str(out), "--device", "cpu", "--results", str(results), "--", *TINY]
    assert main(arguments) == 0
    for name in train_moving_mnist.KEPT:
        assert (out / name).stat().st_size > 0, name
    assert safetensors.torch.load_file(out / "weights.safetensors")
    text = (results / "gpu_moving_mnist.md").read_text()
    assert "copying the last frame" in text
    assert "as trained" in text
    assert (results / "gpu_moving_mnist.json").exists()
    goes_on_elsewhere(tmp_path, out)


def goes_on_elsewhere(tmp_path, before):
    other = tmp_path / "other"
    arguments = ["--minutes", "9", "--begin", str(before), "--out", str(other), "--device", "cpu"]
    assert main([*arguments, "--results", str(tmp_path / "results"), "--", *TINY, "--steps", "4"]) == 0
    assert CheckpointDirectory(other / "run" / "checkpoints").steps()[-1] == 4
    assert json.loads((other / "state" / "state.json").read_text())["updates"]["0"] == 4


def test_the_report_is_written_before_the_state_is_made_small(tmp_path, monkeypatch):
    """Whatever becomes of the state, what was measured is not lost."""

    def fails(run, folder):
        raise RuntimeError("no space left")

    done = subprocess.Popen([sys.executable, "-c", ""])
    made = Report("gpu_moving_mnist", "A run", {"rows": Table("Runs", {"n": "n"}, [{"n": 1}])}, {})
    CheckpointDirectory(tmp_path / "out" / "run" / "checkpoints").save(1, {}, {})
    monkeypatch.setattr(train_moving_mnist, "trainer", lambda options: done)
    monkeypatch.setattr(train_moving_mnist, "collect", lambda *_: {})
    monkeypatch.setattr(train_moving_mnist, "report", lambda *_: made)
    monkeypatch.setattr(train_moving_mnist, "shrink", fails)
    with pytest.raises(RuntimeError, match="no space left"):
        main(["--minutes", "1", "--out", str(tmp_path / "out"), "--device", "cpu", "--results", str(tmp_path)])
    assert (tmp_path / "gpu_moving_mnist.json").exists()


def test_without_the_device_it_is_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--minutes", "1", "--out", str(tmp_path / "out")]) == 0
    assert "skipped: device 'cuda'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


STUBBORN = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit({status})); time.sleep(60)"


@pytest.mark.parametrize("status", [0, 1])
def test_the_trainer_is_asked_to_end_when_the_time_is_up(monkeypatch, status):
    started = []

    def trainer(options):
        process = subprocess.Popen([sys.executable, "-c", STUBBORN.format(status=status)])
        started.append(process)
        return process

    monkeypatch.setattr(train_moving_mnist, "trainer", trainer)
    assert train_for(3.0, []) == (status == 0)
    assert started[0].returncode == status


def test_an_interrupt_ends_the_trainer_once(monkeypatch):
    def trainer(options):
        process = subprocess.Popen([sys.executable, "-c", STUBBORN.format(status=0)])
        code = f"import os, signal, time; time.sleep(3); os.kill(os.getppid(), signal.{signal.SIGINT.name})"
        subprocess.Popen([sys.executable, "-c", code])
        return process

    monkeypatch.setattr(train_moving_mnist, "trainer", trainer)
    assert not train_for(50.0, [])


def test_weights_are_kept_as_they_are_if_they_are_small_enough():
    weights = {"a": torch.randn(1000), "b": torch.randn(4, 4).t(), "n": torch.tensor(3)}
    data, stored = fit_weights(weights, 10_000)
    assert stored == "as trained"
    for name, t in safetensors.torch.load(data).items():
        assert torch.equal(t, weights[name])
    data, stored = fit_weights(weights, 3_000)
    assert stored == "float16"
    assert len(data) <= 3_000
    loaded = safetensors.torch.load(data)
    assert loaded["n"] == 3
    torch.testing.assert_close(loaded["a"].float(), weights["a"], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="more than"):
        fit_weights(weights, 100)
