import numpy as np
import pytest

from crevnet.files import write_arrays, written_whole


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


def test_of_two_that_write_at_once_the_last_one_stays(tmp_path):
    path = tmp_path / "a.txt"
    with written_whole(path) as first, written_whole(path) as second:  # two processes at once
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
