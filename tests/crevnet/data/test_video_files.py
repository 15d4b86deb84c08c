import random

import numpy as np
import pytest
from PIL import Image

from crevnet.data import DataError, find_videos, load_video, video_files


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (40, 41), (8, 12)])
def test_frames_are_cropped_about_the_centre_and_resized(shape, tmp_path):
    """What lies outside the largest centred rectangle of the right proportions leaves no trace."""
    height, width = shape
    marked = np.full((2, height, width), 255, np.uint8)
    rows, columns = min(height, round(width * 2 / 3)), min(width, round(height * 3 / 2))
    top, left = (height - rows) // 2, (width - columns) // 2
    marked[:, top : top + rows, left : left + columns] = 51
    np.save(tmp_path / "a.npy", marked)
    found = load_video(tmp_path / "a.npy", 1, (16, 24))
    assert found.shape == (2, 1, 16, 24)
    assert (found == 51).all()


@pytest.mark.parametrize("every", [1, 2, 3, 7, 40])
def test_every_nth_frame_is_kept_whatever_the_pieces(every, tmp_path, monkeypatch):
    values = np.arange(37, dtype=np.uint8)[:, None, None] * np.ones((16, 16), np.uint8)
    np.save(tmp_path / "a.npy", values)
    for piece in (1, 5, 16, 64):
        monkeypatch.setattr(video_files, "_CHUNK", piece)
        assert (load_video(tmp_path / "a.npy", 1, (16, 16), every)[:, 0, 0, 0] == values[::every, 0, 0]).all()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("limit", [1, 5, 17, 40])
def test_with_a_limit_nothing_is_read_beyond_the_last_frame_that_is_kept(every, limit, tmp_path, monkeypatch):
    read = []

    def count(path, channels):
        for t in range(100):
            read.append(t)
            yield np.full((1, 16, 16), t, np.uint8)

    np.save(tmp_path / "a.npy", np.zeros(1))
    monkeypatch.setattr(video_files, "read_array", count)
    expected = list(range(0, 100, every))[:limit]
    assert load_video(tmp_path / "a.npy", 1, (16, 16), every, limit)[:, 0, 0, 0].tolist() == expected
    assert len(read) == (100 if len(expected) < limit else expected[-1] + 1)


# --- what is refused ---


def test_nothing_there(videos, tmp_path):
    for function in (videos.read, find_videos):
        with pytest.raises(DataError, match=r"a\.npy: no such file"):
            function(tmp_path / "a.npy")


@pytest.mark.parametrize("name", ["every", "limit"])
def test_values_out_of_range(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        load_video(tmp_path, 1, (16, 16), **{name: 0})


def test_an_unknown_kind_of_file(videos, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x")
    videos.refused(tmp_path / "a.txt", "a video is a .npy, .npz, .gif or film file, or a folder of images")


@pytest.mark.parametrize("others", [1, 16, 20])
def test_images_of_different_sizes(videos, others, tmp_path, frames):
    """Sixteen are read at once."""
    for i in range(others):
        Image.fromarray(frames[0]).save(tmp_path / f"{i:02}.png")
    Image.fromarray(frames[1][:8]).save(tmp_path / "99.png")
    videos.refused(tmp_path, "the frames have different sizes: 16 x 16 pixels first, then 8 x 16")


@pytest.mark.filterwarnings("ignore:.* frames decoded, but the film announces")
@pytest.mark.parametrize("kind", ["npy", "npz", "compressed", "gif", "png", "jpg", "mp4"])
def test_damage_of_any_kind_is_refused_with_the_name_or_reads_as_frames(videos, kind, tmp_path, frames):
    """Cut anywhere, or with bytes overwritten anywhere: never another error, never frames that do not fit."""
    path = {"compressed": tmp_path / "a.npz"}.get(kind, tmp_path / f"a.{kind}")
    if kind in ("png", "jpg"):
        path = tmp_path / "images"
        path.mkdir()
        for i in range(2):
            Image.fromarray(frames[i]).save(path / f"{i}.{kind}")
    elif kind == "gif":
        videos.save_gif(path, frames)
    elif kind == "mp4":
        videos.save_film(path, np.random.default_rng(0).integers(0, 256, (3, 3), np.uint8))
    else:
        {"npy": np.save, "npz": np.savez, "compressed": np.savez_compressed}[kind](path, frames)
    file = path / f"1.{kind}" if path.is_dir() else path
    whole = file.read_bytes()
    rng = random.Random(0)
    refusals = 0
    for trial in range(200):
        data = bytearray(whole)
        if trial % 2:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.choice([1, 3, 20])):
                data[rng.choice([rng.randrange(len(data)), rng.randrange(min(128, len(data)))])] = rng.randrange(256)
        file.write_bytes(data)
        try:
            found = videos.read(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 (reading what is left is right as well)
            refusals += 1
        else:
            assert found.shape[1:] == (1, 16, 16)
            assert float(found.min()) >= 0
            assert float(found.max()) <= 1
    assert refusals >= 50
