import gc
import os

import numpy as np
import pytest
from PIL import Image

from crevnet.data import DataError, load_video, video_cache
from crevnet.data.video_cache import cached_video

SIZE = (8, 8)


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8))
    return path


@pytest.fixture
def loads(monkeypatch):
    """The paths that were decoded."""
    found = []

    def load(path, *arguments):
        found.append(path)
        return load_video(path, *arguments)

    monkeypatch.setattr(video_cache, "load_video", load)
    return found


def test_in_use_it_is_shared_and_then_it_goes(video, loads):
    first = cached_video(video, 1, SIZE, 1, None)
    part = first[2:]
    assert np.array_equal(first, load_video(video, 1, SIZE))
    assert cached_video(video, 1, SIZE, 1, None) is first
    del first
    gc.collect()
    assert np.shares_memory(cached_video(video, 1, SIZE, 1, None), part)
    assert loads == [video]
    del part
    gc.collect()
    cached_video(video, 1, SIZE, 1, None)
    assert loads == [video] * 2


def test_files_serve_later_processes(video, loads, tmp_path):
    cache = tmp_path / "new" / "cache"
    expected = load_video(video, 1, SIZE)
    for _ in range(2):
        found = cached_video(video, 1, SIZE, 1, cache)
        assert isinstance(found, np.memmap)
        assert np.array_equal(found, expected)
        del found
        gc.collect()  # as in another process
    assert loads == [video]
    assert len(list(cache.iterdir())) == 1


def test_other_options_and_changed_files_are_decoded_anew(video, loads, tmp_path):
    cache = tmp_path / "cache"
    cached_video(video, 1, SIZE, 1, cache)
    cached_video(video, 1, (4, 8), 1, cache)
    cached_video(video, 1, SIZE, 2, cache)
    assert len(loads) == 3
    stat = video.stat()
    np.save(video, np.zeros((6, 8, 8), np.uint8))
    os.utime(video, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert not cached_video(video, 1, SIZE, 1, cache).any()
    assert len(loads) == 4


def test_a_new_image_in_a_folder_is_noticed(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(folder / f"{i}.png")
        assert len(cached_video(folder, 1, SIZE, 1, tmp_path / "cache")) == i + 1


def test_a_write_that_fails_leaves_nothing(video, tmp_path, monkeypatch):
    def out_of_disk(file, frames):
        file.write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", out_of_disk)
        with pytest.raises(OSError, match="no space left"):
            cached_video(video, 1, SIZE, 1, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(cached_video(video, 1, SIZE, 1, tmp_path / "cache")) == 6


def test_a_damaged_file_is_named(video, tmp_path):
    cached_video(video, 1, SIZE, 1, tmp_path / "cache")
    gc.collect()
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=rf"{file}: damaged; delete it, and it is made again"):
        cached_video(video, 1, SIZE, 1, tmp_path / "cache")
