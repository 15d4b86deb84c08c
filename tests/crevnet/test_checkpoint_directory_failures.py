"""What is left on the disk when a save fails, or its process dies."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

from crevnet.checkpoint_directory import CheckpointDirectory
from tests.crevnet.test_checkpoint import assert_equal, assert_holds, save_steps, state_of, weights_of
from tests.crevnet.test_checkpoint_directory import hidden, snapshot


class Failing:
    """Stands in for a function of `os`: fails at its n-th call, as a full disk or an interrupt would."""

    def __init__(self, function, at, error):
        self.function, self.left, self.error = function, at, error

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.function(*args, **kwargs)


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), OSError("unspecified"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: f"{type(error).__name__}-{error}")
@pytest.mark.parametrize("name", ["fsync", "rename", "replace", "mkdir"])
@pytest.mark.parametrize("step", [3, 2], ids=["new step", "same step"])
def test_a_failure_anywhere_leaves_the_old_or_the_new(tmp_path, monkeypatch, step, name, error):
    for call in range(1, 20):
        directory = CheckpointDirectory(tmp_path / str(call), keep=1)
        save_steps(directory, 1, best=True)
        save_steps(directory, 2)
        failing = Failing(getattr(os, name), call, error)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            failure = failure_of_saving(directory, step)
        if failing.left > 0:
            break
        if isinstance(failure, OSError):
            assert f"the checkpoint of step {step}: " in str(failure)
            assert str(directory.path) in str(failure)
        assert not [entry for entry in hidden(directory.path) if entry.startswith((".saving-", ".best."))]
        assert_holds_the_old_or_the_new(directory, step, new_only=failure is None)
        save_steps(directory, 4)
        assert hidden(directory.path) == []
    assert call > 1, f"os.{name} was never called"


def failure_of_saving(directory, step):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a failure to delete what is old does not fail the save
        try:
            directory.save(step, weights_of(50), state_of(50), best=True)
        except (OSError, KeyboardInterrupt) as error:
            return error
    return None


def assert_holds_the_old_or_the_new(directory, step, new_only):
    best, latest = directory.best(), directory.latest()
    is_new = latest.state["step"] == 50
    assert is_new or not new_only
    if is_new:
        assert latest.step == step
        assert_equal(latest.weights, weights_of(50))
    else:
        assert_holds(latest, 2)
    if best.step == 1:
        assert_holds(best, 1)
        assert not new_only
    else:
        assert is_new
        assert best.step == step


def test_a_write_to_a_full_disk_leaves_earlier_checkpoints_intact(tmp_path):
    directory = CheckpointDirectory(tmp_path / "run" / "checkpoints")
    save_steps(directory, 1)
    before = snapshot(directory.path)
    with file_size_limit(50_000), pytest.raises(OSError, match=r"of step 2: .*checkpoints") as caught:
        directory.save(2, {"large": torch.zeros(100_000)}, {})
    assert caught.value.errno == errno.EFBIG
    assert snapshot(directory.path) == before
    assert hidden(directory.path) == []


@contextlib.contextmanager
def file_size_limit(size):
    """Make the system fail writes beyond a size, in the middle of a file."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


CRASHES = """
    import os, sys
    from pathlib import Path
    import torch
    from crevnet.checkpoint_directory import CheckpointDirectory

    torch.set_num_threads(1)
    countdown = 0

    def die_at_the_nth_change(event, args):
        global countdown
        changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if event in changes or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wxa")):
            countdown -= 1
            if countdown == 0:
                os._exit(77)

    def weights(value):
        return {"w": torch.full((3,), float(value))}

    def check(directory, step):
        directory.best()
        latest = directory.latest()
        value = latest.state["value"]
        assert torch.equal(latest.weights["w"], torch.full((3,), float(value)))
        assert (latest.step, value) in ((2, 2), (step, 50)), (latest.step, value)
        assert set(directory.steps()) <= {1, 2, step}
        return value

    sys.addaudithook(die_at_the_nth_change)
    root, step = Path(sys.argv[1]), int(sys.argv[2])
    outcomes = []
    for crash in range(1, 100):
        directory = CheckpointDirectory(root / str(crash), keep=1)
        for value in (1, 2):
            directory.save(value, weights(value), {"value": value}, best=value == 1)
        child = os.fork()
        if child == 0:
            countdown = crash
            directory.save(step, weights(50), {"value": 50}, best=True)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77
        outcomes.append(check(directory, step))
        directory.save(9, weights(9), {"value": 9})
        assert {entry.name for entry in directory.path.iterdir() if entry.name[0] == "."} == {".lock"}
        if not died:
            break
    assert not died
    print(*outcomes)
"""


@pytest.mark.parametrize("step", [3, 2], ids=["new step", "same step"])
def test_a_process_that_dies_at_any_change_of_the_disk_leaves_the_old_or_the_new(tmp_path, step):
    """A fresh process forks a child for every change that a save makes, to die just before it."""
    command = [sys.executable, "-c", textwrap.dedent(CRASHES), str(tmp_path), str(step)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    outcomes = result.stdout.split()
    assert outcomes == sorted(outcomes), "the change from the old to the new checkpoint happens once"
    assert outcomes.count("2") >= 6
    assert outcomes.count("50") >= 6


def test_leftovers_of_dead_saves_are_cleared_by_the_next(tmp_path):
    directory = CheckpointDirectory(tmp_path / "run" / "checkpoints")
    save_steps(directory, 1)
    for name in (".saving-step-00000002-dead", ".removing-dead"):
        (directory.path / name).mkdir()
        (directory.path / name / "weights.safetensors").write_bytes(b"half")
    (directory.path / ".best.dead.json").write_bytes(b"{")
    assert directory.steps() == [1]
    save_steps(directory, 2)
    assert hidden(directory.path) == []
    assert directory.steps() == [1, 2]


def test_what_cannot_be_deleted_is_reported_and_does_not_fail_the_save(tmp_path, monkeypatch):
    directory = CheckpointDirectory(tmp_path, keep=1)
    save_steps(directory, 1)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", Failing(None, 1, PermissionError(errno.EACCES, "Permission denied")))
        with pytest.warns(RuntimeWarning, match=r"could not delete .*Permission denied"):
            save_steps(directory, 2)
    assert directory.steps() == [2]
    save_steps(directory, 3)
    assert hidden(directory.path) == []
