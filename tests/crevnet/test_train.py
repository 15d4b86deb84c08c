"""The command line of training: what it prints and returns, and real processes that are killed, stopped or several."""

import json
import os
import shutil
import signal
import time

import pytest
import torch

import crevnet.train
from crevnet.checkpoint import DamagedCheckpoint
from crevnet.checkpoint_directory import CheckpointDirectory
from crevnet.command import CONFIGS, load_config
from crevnet.data import WorkerDied
from crevnet.train import main
from crevnet.training_step import TrainingDiverged
from revgrad import ReversibilityError

pytestmark = pytest.mark.usefixtures("single_thread")
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "crevnet.train"]
DISTRIBUTED = {
    "batch_size": 4,
    "steps": 3,
    "model.mode": "auto",
    "run.checkpoint_every": 1,
    "run.keep": 9,
    "run.validation_sequences": 5,  # the processes get different numbers of them
    "optimiser.schedule": "constant",  # so that the run may be made longer
    "optimiser.clip_norm": 0.05,
    "feeding.kind": "scheduled",
    "feeding.fall_to": 6,
}


@pytest.fixture(scope="module")
def processes(tiny, tmp_path_factory):
    """What became of real processes, run side by side: three that get a signal amid their steps, and torchrun twice.

    SIGTERM and SIGINT go to the whole group, workers too, as SLURM and a terminal send them. By name: folder, exit
    status, what was printed, and the newest checkpoint when it had ended.
    """
    base = tmp_path_factory.mktemp("processes")
    signalled = {number: base / number.name for number in SIGNALS}
    running = {
        n: tiny.start("crevnet.train", *tiny.arguments(f, tiny.scheduled | {"run.workers": 2}), group=True)
        for n, f in signalled.items()
    }
    several = {
        strategy: tiny.start(*TORCHRUN, *tiny.arguments(base / strategy, DISTRIBUTED | {"run.strategy": strategy}))
        for strategy in ("ddp", "fsdp")
    }
    try:
        waiting, deadline = dict(running), time.monotonic() + 300
        while waiting:
            for number, process in list(waiting.items()):
                if max(CheckpointDirectory(signalled[number] / "checkpoints").steps(), default=0) >= 4:
                    (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
                    del waiting[number]
                assert process.poll() is None or number not in waiting, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        found = {}
        for name, process in [*running.items(), *several.items()]:
            out, err = process.communicate(timeout=300)
            folder = signalled[name] if name in signalled else base / name
            steps = CheckpointDirectory(folder / "checkpoints").steps()
            found[name] = (folder, process.returncode, out, err, max(steps))
    finally:
        for process in (*running.values(), *several.values()):
            process.kill()
            process.wait()
    return found


# --- killed and stopped ---


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_run_that_was_killed_or_stopped_goes_on_bit_for_bit(number, processes, tiny, finished_run, capsys):
    folder, _, _, _, step = processes[number]
    assert 4 <= step < 24
    assert not (folder / "metrics.json").exists()
    assert main(tiny.arguments(folder, tiny.scheduled)) == 0
    assert f"Going on from step {step} in {folder}" in capsys.readouterr().out
    tiny.assert_equal(tiny.weights(folder, 24), tiny.weights(finished_run, 24))
    for kind in ("train", "validation"):
        for name in ("step", *(("loss", "gradient_norm") if kind == "train" else ("mse", "ssim", "psnr"))):
            assert tiny.column(folder, name, kind) == tiny.column(finished_run, name, kind)
    one, other = (json.loads((f / "metrics.json").read_text()) for f in (folder, finished_run))
    assert one["mse"] == other["mse"]
    assert one["step"] == other["step"]
    assert one["peak_activation_bytes"] == other["peak_activation_bytes"]


def test_kill_leaves_no_time_to_save(processes):
    folder, status, _, _, step = processes[signal.SIGKILL]
    assert status == -signal.SIGKILL
    assert step % 2 == 0
    assert (folder / "config.yaml").exists()


@pytest.mark.parametrize("number", SIGNALS[1:], ids=lambda n: n.name)
def test_sigterm_and_ctrl_c_save_at_the_current_step_and_end_cleanly(number, processes):
    folder, status, out, err, step = processes[number]
    assert status == 0
    assert f"Interrupted and saved at step {step} in {folder}: the same command goes on from there." in out
    assert "Traceback" not in err
    assert "sequences/s" in err  # the progress bar
    assert "peak activations" in err


def test_the_progress_bar_tells_the_last_validation(processes, tiny):
    folder, _, _, err, _ = processes["ddp"]
    error = float(tiny.column(folder, "mse", "validation")[-1])
    assert f"validation MSE {error:.2f}" in err


# --- several processes ---


@pytest.fixture(scope="module")
def one_process(tiny, tmp_path_factory):
    """The folder of the same run in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert main(tiny.arguments(folder, DISTRIBUTED)) == 0
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_make_the_steps_of_one(strategy, processes, one_process, tiny):
    """The same global batch, in gradients and in weights; only the order of summation differs."""
    folder, status, _, err, _ = processes[strategy]
    assert status == 0, err
    single = one_process
    for step in (1, 2, 3):
        ours, theirs = (tiny.state(f, step)["optimiser"]["state"] for f in (folder, single))
        # Adam's first moment is (1 - 0.9) times the gradient at first, and then a sum of gradients
        for moment in ("exp_avg", "exp_avg_sq"):
            a, b = (torch.cat([s[i][moment].flatten() for i in sorted(s)]) for s in (ours, theirs))
            assert float((a - b).norm() / b.norm()) < 1e-6
        ours, theirs = (tiny.weights(f, step) for f in (folder, single))
        assert ours.keys() == theirs.keys()
        a, b = (torch.cat([w[name].flatten() for name in sorted(w)]) for w in (ours, theirs))
        assert float((a - b).norm() / b.norm()) < 1e-6
    for name in ("loss", "gradient_norm"):
        a, b = ([float(x) for x in tiny.column(f, name)] for f in (folder, single))
        assert a == pytest.approx(b, rel=2e-6)
    for name in ("mse", "ssim", "psnr"):
        a, b = ([float(x) for x in tiny.column(f, name, "validation")] for f in (folder, single))
        assert a == pytest.approx(b, rel=1e-5)
    ours, theirs = (json.loads((f / "metrics.json").read_text()) for f in (folder, single))
    assert ours["sequences"] == theirs["sequences"] == 5
    assert ours["trained_on"] == theirs["trained_on"] | {"processes": 2}
    assert ours["copy_last_frame"] == pytest.approx(theirs["copy_last_frame"], rel=1e-12)
    for name in ("mse", "ssim", "psnr"):
        assert ours["per_frame"][name] == pytest.approx(theirs["per_frame"][name], rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_only_one_of_two_processes_writes(strategy, processes, tiny):
    folder, _, out, err, _ = processes[strategy]
    assert tiny.column(folder, "step") == ["1", "2", "3"]
    assert tiny.column(folder, "step", "validation") == ["3"]
    assert CheckpointDirectory(folder / "checkpoints").steps() == [1, 2, 3]
    events = [p.name.split(".")[4:5] for p in (folder / "tensorboard").iterdir()]
    assert len({tuple(e) for e in events}) == 1  # the process's number is part of the name
    assert out.count("Run folder: ") == 1
    assert out.count("Training stored: needs ") == 1
    assert out.count("copy last frame") == 1
    assert "Traceback" not in err


def test_what_one_process_is_refused_all_are(processes, tiny):
    other = tiny.arguments(processes["ddp"][0], DISTRIBUTED | {"seed": 5})
    process = tiny.start(*TORCHRUN, *other)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert err.count("seed was 0, is 5); choose another run.folder") == 2
    assert "crevnet/training.py" not in err  # a traceback


def test_a_sharded_run_goes_on_sharded_or_in_one_process(processes, tiny, tmp_path):
    longer = DISTRIBUTED | {"steps": 4, "run.strategy": "fsdp"}
    folders = [shutil.copytree(processes["fsdp"][0], tmp_path / name) for name in ("sharded", "whole")]
    process = tiny.start(*TORCHRUN, *tiny.arguments(folders[0], longer))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Going on from step 3" in out
    assert "returned a view" not in err
    assert main(tiny.arguments(folders[1], longer | {"run.strategy": "ddp"})) == 0
    one, other = (tiny.weights(folder, 4) for folder in folders)
    for name, x in one.items():
        assert float((x - other[name]).norm()) <= 1e-6 * float(other[name].norm()) + 1e-7, name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_begin_with_the_weights_of_another_run(strategy, one_process, tiny, tmp_path):
    begun = DISTRIBUTED | {"run.init": one_process, "steps": 1, "seed": 7}
    process = tiny.start(*TORCHRUN, *tiny.arguments(tmp_path / "two", begun | {"run.strategy": strategy}))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("Beginning with the weights of step 3 in ") == 1
    assert main(tiny.arguments(tmp_path / "one", begun)) == 0
    ours, theirs = ([float(x) for x in tiny.column(tmp_path / name, "loss")] for name in ("two", "one"))
    assert ours == pytest.approx(theirs, rel=2e-6)
    ours, theirs = (tiny.weights(tmp_path / name, 1) for name in ("two", "one"))
    for name, x in ours.items():
        assert float((x - theirs[name]).norm()) <= 1e-6 * float(theirs[name].norm()) + 1e-7, name


# --- what it returns and prints ---


@pytest.fixture
def trained(monkeypatch):
    """Configurations that would have been trained, instead of training them."""
    configs = []
    monkeypatch.setattr(crevnet.train, "train", configs.append)
    return configs


def test_without_a_configuration_it_is_the_quick_one(trained):
    assert main([]) == 0
    assert trained == [load_config(CONFIGS / "quick.yaml")]


def test_options_override_the_quick_configuration(trained):
    assert main(["--steps", "3", "--model.modules=2"]) == 0
    quick = load_config(CONFIGS / "quick.yaml")
    assert (trained[0].steps, trained[0].model.modules) == (3, 2)
    assert trained[0].optimiser == quick.optimiser
    assert trained[0].model.blocks == quick.model.blocks


def test_help_says_that_the_quick_configuration_replaces_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "Without --config, configs/quick.yaml is read, whose values take the place of the defaults listed" in told


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_a_configuration_replaces_the_quick_one(form, trained):
    path = CONFIGS / "moving_mnist_convlstm.yaml"
    assert main([a.format(path) for a in form] + ["--batch_size=4"]) == 0
    expected = load_config(path)
    expected.batch_size = 4
    assert trained == [expected]


def test_a_missing_configuration_ends_with_status_2(trained, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config=/nonexistent.yaml"])
    assert stop.value.code == 2
    assert "/nonexistent.yaml" in capsys.readouterr().err
    assert trained == []


@pytest.mark.parametrize(
    "error",
    [
        TrainingDiverged("step 3"),
        WorkerDied("of one"),
        DamagedCheckpoint("all of them"),
        ReversibilityError("layer 3"),
        ValueError("other"),
        OSError(28, "disk is full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_user_can_mend_ends_with_status_1_and_a_message(error, monkeypatch, capsys):
    def fail(config):
        raise error

    monkeypatch.setattr(crevnet.train, "train", fail)
    assert main([]) == 1
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_programming_error_keeps_its_traceback(monkeypatch):
    def fail(config):
        raise KeyError("oops")

    monkeypatch.setattr(crevnet.train, "train", fail)
    with pytest.raises(KeyError):
        main([])


def test_mistakes_that_only_training_can_find_end_with_a_message(tiny, finished_run, tmp_path, capsys):
    other = tiny.arguments(finished_run, tiny.scheduled | {"seed": 5})
    assert main(other) == 1
    assert "seed was 0, is 5); choose another run.folder" in capsys.readouterr().err
    missing = tiny.arguments(tmp_path / "run", {"data.root": tmp_path / "mnist"})
    assert main(missing) == 1
    assert (tmp_path / "run" / "config.yaml").exists()  # and yet the next command may have other options
    said = capsys.readouterr().err
    assert str(tmp_path / "mnist") in said
    assert "--data.download true" in said
    assert main(tiny.arguments(tmp_path / "run", {"run.device": "gpu"})) == 1
    assert capsys.readouterr().err == "error: device must be auto, cpu or cuda, got 'gpu'\n"
    assert main(tiny.arguments(finished_run, tiny.scheduled | {"steps": 25})) == 1
    assert "(steps was 24, is 25); choose another run.folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(tiny.arguments(tmp_path / "file", {"steps": 1})) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_the_result_is_printed_beside_the_baseline(tiny, tmp_path, capsys):
    assert main(tiny.arguments(tmp_path / "run", {"steps": 1})) == 0
    out = capsys.readouterr().out.splitlines()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert out[:2] == [f"Run folder: {tmp_path}/run", "Training reversible"]
    rows = {line[:18].strip(): [float(x) for x in line[18:].split()] for line in out[4:6]}
    for name, of in (("crevnet", metrics), ("copy last frame", metrics["copy_last_frame"])):
        assert rows[name] == pytest.approx([of[k] for k in ("mse", "ssim", "psnr")], abs=0.006)
