import threading
import warnings

import pytest

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
