import numpy as np
import pytest

from crevnet.files import write_arrays


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
