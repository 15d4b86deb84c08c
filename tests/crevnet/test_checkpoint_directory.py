import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import torch

from crevnet.checkpoint import DamagedCheckpoint
from crevnet.checkpoint_directory import CheckpointDirectory
from tests.crevnet.test_checkpoint import (
    assert_equal,
    assert_holds,
    damage_by_deleting,
    damage_by_emptying,
    damage_by_truncating,
    save_steps,
    state_of,
    weights_of,
)


def snapshot(path):
    """Every visible file below a folder, with its content."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def hidden(path):
    return [entry.name for entry in path.iterdir() if entry.name.startswith(".") and entry.name != ".lock"]


@pytest.fixture
def directory(tmp_path):
    return CheckpointDirectory(tmp_path / "run" / "checkpoints")


def test_an_empty_directory_has_no_checkpoints(directory):
    assert directory.steps() == []
    assert directory.latest() is None
    assert directory.best() is None
    assert not directory.path.exists()
    with pytest.raises(FileNotFoundError, match=r"step-00000003"):
        directory.load(3)


# --- what is kept ---


def test_only_the_newest_and_the_best_are_kept(directory):
    save_steps(directory, 1)
    save_steps(directory, 2, best=True)
    save_steps(directory, 3, 4, 5, 6)
    assert directory.steps() == [2, 4, 5, 6]
    assert_holds(directory.best(), 2)
    assert_holds(directory.latest(), 6)
    save_steps(directory, 7, best=True)
    assert directory.steps() == [5, 6, 7]
    assert_holds(directory.best(), 7)
    assert hidden(directory.path) == []


def test_steps_are_ordered_as_numbers(directory):
    save_steps(directory, 99_999_999, 100_000_000)
    assert directory.steps() == [99_999_999, 100_000_000]
    assert_holds(directory.latest(), 100_000_000)


def test_unrelated_entries_are_neither_listed_nor_deleted(tmp_path):
    directory = CheckpointDirectory(tmp_path, keep=1)
    strangers = ["notes", "step-12", "step-000000001", "step-00000001.bak", "xstep-00000001"]
    for name in strangers:
        (tmp_path / name).mkdir()
    save_steps(directory, 2, 3)
    assert directory.steps() == [3]
    assert all((tmp_path / name).is_dir() for name in strangers)


def test_going_back_to_an_earlier_step_deletes_no_later_one_and_not_itself(tmp_path):
    directory = CheckpointDirectory(tmp_path, keep=2)
    save_steps(directory, 8, 9, 1, 2, 3)
    assert directory.steps() == [2, 3, 8, 9]


def test_saving_a_step_again_replaces_it(directory):
    save_steps(directory, 1, 2)
    directory.save(2, weights_of(50), state_of(50))
    assert directory.steps() == [1, 2]
    assert_equal(directory.load(2).weights, weights_of(50))
    assert hidden(directory.path) == []


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_nothing_is_refused(tmp_path, keep):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        CheckpointDirectory(tmp_path, keep=keep)


def test_a_negative_step_is_refused(directory):
    with pytest.raises(ValueError, match="must not be negative"):
        directory.save(-1, {}, {})


# --- falling back ---


def test_latest_passes_over_damaged_checkpoints_loudly_and_leaves_them(directory):
    save_steps(directory, 1, 2, 3)
    damage_by_truncating(directory.path / "step-00000003" / "weights.safetensors")
    damage_by_deleting(directory.path / "step-00000002" / "manifest.json")
    before = snapshot(directory.path)
    with pytest.warns(RuntimeWarning, match="passing over") as caught:
        assert_holds(directory.latest(), 1)
    newer, older = (str(warning.message) for warning in caught)
    assert "step-00000003/weights.safetensors: bytes is" in newer
    assert "step-00000002/manifest.json: is missing" in older
    assert snapshot(directory.path) == before


def test_an_undamaged_latest_is_loaded_in_silence(directory):
    save_steps(directory, 1, 2)
    damage_by_truncating(directory.path / "step-00000001" / "state.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_holds(directory.latest(), 2)


def test_all_damaged_is_an_error_and_not_a_fresh_start(directory):
    save_steps(directory, 1, 2)
    for step in (1, 2):
        damage_by_emptying(directory.path / f"step-0000000{step}" / "state.pt")
    with pytest.warns(RuntimeWarning), pytest.raises(DamagedCheckpoint, match="all checkpoints") as caught:
        directory.latest()
    assert "step-00000001" in str(caught.value)
    assert "step-00000002" in str(caught.value)


def test_a_run_that_fell_back_replaces_what_was_damaged(directory):
    save_steps(directory, 1, 2, 3)
    damage_by_truncating(directory.path / "step-00000003" / "state.pt")
    save_steps(directory, 2, 3)
    assert_holds(directory.latest(), 3)


def test_a_damaged_best_checkpoint_is_an_error(directory):
    save_steps(directory, 1, best=True)
    save_steps(directory, 2)
    damage_by_truncating(directory.path / "step-00000001" / "state.pt")
    with pytest.raises(DamagedCheckpoint, match=r"step-00000001/state.pt"):
        directory.best()


def test_an_intact_best_is_loaded_in_silence(directory):
    assert directory.intact_best() is None
    save_steps(directory, 1, best=True)
    save_steps(directory, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_holds(directory.intact_best(), 1)


@pytest.mark.parametrize("file", ["step-00000001/state.pt", "best.json"])
def test_a_damaged_best_is_none_intact_and_reported(file, directory):
    save_steps(directory, 1, best=True)
    save_steps(directory, 2)
    damage_by_truncating(directory.path / file)
    before = snapshot(directory.path)
    with pytest.warns(RuntimeWarning, match=rf"passing over a damaged checkpoint: .*{file}"):
        assert directory.intact_best() is None
    assert snapshot(directory.path) == before


def test_a_best_checkpoint_that_is_gone_is_an_error(directory):
    save_steps(directory, 1, best=True)
    (directory.path / "step-00000001").rename(directory.path / "moved")
    with pytest.raises(DamagedCheckpoint, match=r"best.json: names step 1, which is not there"):
        directory.best()


class WhileItSaves(CheckpointDirectory):
    """Reads a running training's checkpoints: that saves a step, and deletes the old one, before the first is read."""

    def load(self, step):
        if self.steps() != [2]:
            save_steps(CheckpointDirectory(self.path, keep=1), 2, best=True)
        return super().load(step)


@pytest.mark.parametrize("read", ["best", "latest", "intact_best"])
def test_a_checkpoint_that_a_newer_one_replaces_while_it_is_read_is_no_damage(read, tmp_path):
    save_steps(CheckpointDirectory(tmp_path, keep=1), 1, best=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_holds(getattr(WhileItSaves(tmp_path), read)(), 2)


@pytest.mark.parametrize("content", ["", "7", "{}", '{"format": 1}', '{"format": 1, "step": -1}'])
def test_a_damaged_pointer_is_an_error_and_stops_deletion(directory, content):
    save_steps(directory, 1, best=True)
    (directory.path / "best.json").write_text(content)
    with pytest.raises(DamagedCheckpoint, match=r"best.json"):
        directory.best()
    with pytest.warns(RuntimeWarning, match="deleting no old checkpoint"):
        save_steps(directory, 2, 3, 4, 5)
    assert directory.steps() == [1, 2, 3, 4, 5]


# --- failures and crashes while saving ---


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
        assert not [entry for entry in hidden(directory.path) if entry.startswith(".saving-")]
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


def test_a_write_to_a_full_disk_leaves_earlier_checkpoints_intact(directory):
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


def test_leftovers_of_dead_saves_are_cleared_by_the_next(directory):
    save_steps(directory, 1)
    for name in (".saving-step-00000002-dead", ".removing-dead"):
        (directory.path / name).mkdir()
        (directory.path / name / "weights.safetensors").write_bytes(b"half")
    (directory.path / ".saving-best.json-dead").write_bytes(b"{")
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


def test_saves_of_two_threads_take_turns(tmp_path):
    directory = CheckpointDirectory(tmp_path, keep=50)
    parts = (range(0, 20, 2), range(1, 20, 2))
    threads = [threading.Thread(target=save_steps, args=(directory, *steps)) for steps in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert directory.steps() == list(range(20))
    for step in range(20):
        assert_holds(directory.load(step), step)
