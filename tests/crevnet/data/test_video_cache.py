import gc
import io
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


def test_frames_of_an_older_version_of_decoding_are_not_read(video, loads, tmp_path, monkeypatch):
    for version in (1, 2, 2, 1):
        monkeypatch.setattr(video_cache, "DECODING", version)
        cached_video(video, 1, SIZE, 1, tmp_path / "cache")
        gc.collect()
    assert len(loads) == 2


def as_bytes(array, save=np.save):
    file = io.BytesIO()
    save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda whole: whole[:200], "mmap length is greater"),
        (lambda whole: b"", "No data left in file"),
        (lambda whole: b"damage", ""),
        (lambda whole: b"PK\x03\x04 damage", "not a zip file"),
        (lambda whole: as_bytes(np.zeros((3, 2))), r"frames \[1, 8, 8\] are wanted, an array of shape \(3, 2\)"),
        (lambda whole: as_bytes(np.zeros((6, 3, 8, 8), np.uint8)), r"of shape \(6, 3, 8, 8\) is there"),
        (lambda whole: as_bytes(np.zeros((6, 1, 8, 4), np.uint8)), r"of shape \(6, 1, 8, 4\) is there"),
        (lambda whole: as_bytes(np.zeros((0, 1, 8, 8), np.uint8)), r"of shape \(0, 1, 8, 8\) is there"),
        (lambda whole: as_bytes(np.zeros((6, 1, 8, 8))), "it holds float64"),
        (lambda whole: as_bytes(np.zeros((6, 1, 8, 8), np.uint8), np.savez), "it is an archive"),
    ],
    ids=["cut", "empty", "damage", "zip", "flat", "channels", "size", "no frames", "dtype", "archive"],
)
def test_a_damaged_file_is_named(change, reason, video, tmp_path):
    cached_video(video, 1, SIZE, 1, tmp_path / "cache")
    gc.collect()
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DataError, match=rf"{file}: damaged; delete it, and it is made again \(.*{reason}"):
        cached_video(video, 1, SIZE, 1, tmp_path / "cache")
    file.unlink()
    assert len(cached_video(video, 1, SIZE, 1, tmp_path / "cache")) == 6
