import errno
import os
from pathlib import Path

import numpy as np
import pytest

from crevnet.files import check_writable, sync_folder, write_arrays, written_whole


def test_arrays_come_back(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros(0, np.float32)}
    write_arrays(tmp_path / "new" / "folder" / "x.npz", arrays)
    with np.load(tmp_path / "new" / "folder" / "x.npz") as read:
        assert sorted(read) == ["a", "b"]
        for name, array in arrays.items():
            assert np.array_equal(read[name], array)
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["x.npz"]


def test_a_failed_write_leaves_the_file_before(tmp_path, monkeypatch):
    write_arrays(tmp_path / "x.npz", {"a": np.ones(3)})

    def out_of_disk(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", out_of_disk)
    with pytest.raises(OSError, match="no space left"):
        write_arrays(tmp_path / "x.npz", {"a": np.zeros(3)})
    with np.load(tmp_path / "x.npz") as read:
        assert np.array_equal(read["a"], np.ones(3))


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.tar.gz"
    with written_whole(path) as part:
        assert (part.parent, part.suffix) == (path.parent, ".gz")
        part.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    def fail(part):
        part.write_text("half")
        raise KeyError

    with pytest.raises(KeyError), written_whole(tmp_path / "a.txt") as part:
        fail(part)
    assert list(tmp_path.iterdir()) == []


def test_a_write_to_a_full_disk_names_the_file_and_leaves_the_one_before(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("before")

    def write():
        with written_whole(path) as part:
            part.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*/metrics\.json'") as caught:
        write()
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "before"


def test_a_file_that_cannot_be_made_is_named_as_the_user_knows_it(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(arguments[0]))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(PermissionError) as caught, written_whole(tmp_path / "metrics.json") as part:
        part.write_text("")
    assert caught.value.filename == str(tmp_path / "metrics.json")


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied", "frames.npy"), OSError("no network")])
def test_an_error_of_something_else_is_passed_on(error, tmp_path):
    with pytest.raises(OSError, match=str(error.args[-1])) as caught, written_whole(tmp_path / "x.npy"):
        raise error
    assert caught.value is error


def test_of_two_that_write_at_once_the_last_one_stays(tmp_path):
    path = tmp_path / "a.txt"
    with written_whole(path) as first, written_whole(path) as second:  # two processes at once
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


# --- a loss of power ---


@pytest.fixture
def disk(monkeypatch):
    """What is brought to the disk, and renamed, in this order."""
    done = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(("fsync", path, None if path.is_dir() else path.read_text()))
        fsync(descriptor)

    def note_replace(source, target):
        done.append(("replace", Path(source), Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return done


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_it_goes_on(disk, tmp_path):
    with written_whole(tmp_path / "a.txt") as part, part.open("w") as f:
        f.write("all of it")
    assert disk == [
        ("fsync", part, "all of it"),
        ("replace", part, tmp_path / "a.txt"),
        ("fsync", tmp_path, None),
    ]


def test_a_file_that_does_not_reach_the_disk_leaves_the_one_before(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("before")

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"), written_whole(tmp_path / "a.txt") as part:
        part.write_text("after")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "before")]


def test_a_file_system_that_cannot_bring_folders_to_the_disk_does_without(tmp_path, monkeypatch):
    def refuse(number):
        def fsync(descriptor):
            raise OSError(number, "no")

        monkeypatch.setattr(os, "fsync", fsync)

    refuse(errno.EINVAL)
    sync_folder(tmp_path)
    refuse(errno.EIO)
    with pytest.raises(OSError, match="no"):
        sync_folder(tmp_path)


# --- before the work ---


def test_a_place_that_can_be_written_is_left_empty(tmp_path):
    check_writable(tmp_path / "new" / "a.json")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "a.json").write_text("before")
    check_writable(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "before"


@pytest.mark.parametrize("name", ["file/a.json", "file/more/a.json"])
def test_a_place_that_cannot_be_written_is_named(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written, choose another place") as error:
        check_writable(tmp_path / name)
    assert error.value.filename == str(tmp_path / name)


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder, name a file in it"):
        check_writable(tmp_path)
