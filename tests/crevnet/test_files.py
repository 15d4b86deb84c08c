import random
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from crevnet.files import read_frames, write_arrays


@pytest.fixture
def frames():
    """uint8 [T, H, W]"""
    return np.random.default_rng(0).integers(0, 256, (5, 16, 16), np.uint8)


def expected(frames):
    return torch.from_numpy(frames.astype(np.float32) / 255)[:, None]


def save_gif(path, frames, mode="L"):
    first, *rest = [Image.fromarray(f).convert(mode) for f in frames]
    first.save(path, save_all=True, append_images=rest, duration=100)


def refused(path, message, channels=1, size=16):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_frames(path, channels, size)
    assert str(path) in str(error.value)


# --- what can be read ---


def test_npy(tmp_path, frames):
    np.save(tmp_path / "a.npy", frames)
    read = read_frames(tmp_path / "a.npy", 1, 16)
    assert read.dtype == torch.float32
    assert torch.equal(read, expected(frames))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_taken_as_they_are(dtype, tmp_path):
    values = np.linspace(0, 1, 2 * 16 * 16).reshape(2, 16, 16).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    assert torch.equal(read_frames(tmp_path / "a.npy", 1, 16)[:, 0], torch.from_numpy(values.astype(np.float32)))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_with_channels(channels, tmp_path):
    values = np.random.default_rng(1).integers(0, 256, (2, channels, 16, 16), np.uint8)
    np.save(tmp_path / "a.npy", values)
    assert torch.equal(read_frames(tmp_path / "a.npy", channels, 16) * 255, torch.from_numpy(values).float())


def test_npz_with_one_array_whatever_its_name(tmp_path, frames):
    np.savez(tmp_path / "a.npz", digits=frames)
    assert torch.equal(read_frames(tmp_path / "a.npz", 1, 16), expected(frames))


def test_npz_with_several_arrays_needs_one_called_frames(tmp_path, frames):
    np.savez_compressed(tmp_path / "a.npz", labels=np.arange(5), frames=frames)
    assert torch.equal(read_frames(tmp_path / "a.npz", 1, 16), expected(frames))
    np.savez(tmp_path / "b.npz", labels=np.arange(5), digits=frames)
    refused(tmp_path / "b.npz", "['labels', 'digits']")


def test_gif(tmp_path, frames):
    save_gif(tmp_path / "a.gif", frames)
    assert torch.equal(read_frames(tmp_path / "a.gif", 1, 16), expected(frames))


def test_gif_in_capitals(tmp_path, frames):
    save_gif(tmp_path / "A.GIF", frames)
    assert torch.equal(read_frames(tmp_path / "A.GIF", 1, 16), expected(frames))


def test_a_gif_whose_frames_are_stored_as_differences(tmp_path):
    """Encoders store only what changes from frame to frame: each must come back whole."""
    moving = np.zeros((4, 16, 16), np.uint8)
    for t in range(4):
        moving[t, 4:8, 2 * t : 2 * t + 4] = 255
    save_gif(tmp_path / "a.gif", moving)
    assert torch.equal(read_frames(tmp_path / "a.gif", 1, 16), expected(moving))


def test_images_in_a_folder_are_read_in_the_order_of_their_names(tmp_path, frames):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in (3, 0, 4, 2, 1):
        Image.fromarray(frames[i]).save(folder / f"frame-{i}.png")
    (folder / ".DS_Store").write_bytes(b"not a frame")
    assert torch.equal(read_frames(folder, 1, 16), expected(frames))


def test_colour_images_are_converted_to_grey_and_back(tmp_path, frames):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.stack([frames[0]] * 3, axis=-1)).save(folder / "0.png")
    Image.fromarray(frames[1]).save(folder / "1.png")
    assert torch.equal(read_frames(folder, 1, 16), expected(frames[:2]))
    assert torch.equal(read_frames(folder, 3, 16), expected(frames[:2]).expand(-1, 3, -1, -1))


def test_the_channels_of_colour_images_stay_in_order(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[..., 0], pixels[2, 5, 1], pixels[..., 2] = 255, 51, 102
    Image.fromarray(pixels).save(folder / "0.png")
    read = read_frames(folder, 3, 16)
    assert torch.equal(read[0], torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


# --- what is refused ---


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.npy: no such file"):
        read_frames(tmp_path / "a.npy", 1, 16)


def test_an_unknown_kind_of_file(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    refused(tmp_path / "a.mp4", "a sequence is a .npy, .npz or .gif file, or a folder of images")


@pytest.mark.parametrize("shape", [(5, 16, 15), (5, 32, 32), (5, 3, 16, 16), (16, 16), (5,), (), (2, 5, 1, 16, 16)])
def test_a_wrong_shape(shape, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    refused(tmp_path / "a.npy", "the model needs (1, 16, 16)")


def test_images_of_a_wrong_size(tmp_path, frames):
    save_gif(tmp_path / "a.gif", frames)
    refused(tmp_path / "a.gif", "frames of shape (1, 16, 16) found, the model needs (1, 32, 32)", size=32)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_no_frames(dtype, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((0, 16, 16), dtype))
    refused(tmp_path / "a.npy", "holds no frames")


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex64, "U3"])
def test_a_wrong_type(dtype, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 16, 16), dtype))
    refused(tmp_path / "a.npy", "frames must be uint8 or floats in 0 .. 1")


@pytest.mark.parametrize("value", [-0.01, 1.01, 255, np.nan, np.inf])
def test_floats_out_of_range(value, tmp_path):
    values = np.zeros((2, 16, 16), np.float32)
    values[1, 3, 3] = value
    np.save(tmp_path / "a.npy", values)
    refused(tmp_path / "a.npy", "float frames must be finite and in 0 .. 1")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_pickles_are_refused_unread(suffix, tmp_path):
    save = {"npy": np.save, "npz": np.savez}[suffix]
    save(tmp_path / f"a.{suffix}", np.array([Bomb()], dtype=object))
    refused(tmp_path / f"a.{suffix}", "not a readable array file")


def test_an_archive_without_arrays(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as z:
        z.writestr("readme.txt", "hello")
    refused(tmp_path / "a.npz", "not a readable array file: holds no array")
    with zipfile.ZipFile(tmp_path / "b.npz", "w"):
        pass
    refused(tmp_path / "b.npz", "not a readable array file")


def test_an_empty_folder(tmp_path):
    (tmp_path / ".hidden").write_bytes(b"")
    refused(tmp_path, "the folder is empty")


def test_a_folder_with_something_else_in_it_names_the_file(tmp_path, frames):
    Image.fromarray(frames[0]).save(tmp_path / "0.png")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path, "notes.txt")


def test_images_of_different_sizes(tmp_path, frames):
    Image.fromarray(frames[0]).save(tmp_path / "0.png")
    Image.fromarray(frames[1][:8]).save(tmp_path / "1.png")
    refused(tmp_path, "the images have different sizes")


def test_images_for_a_model_with_other_channels(tmp_path, frames):
    save_gif(tmp_path / "a.gif", frames)
    refused(tmp_path / "a.gif", "images have 1 or 3 channels, the model needs 4", channels=4)


@pytest.mark.parametrize("kind", ["npy", "npz", "compressed", "gif", "png", "jpg"])
def test_damage_of_any_kind_is_refused_with_the_name_or_reads_as_frames(kind, tmp_path, frames):
    """Cut anywhere, or with bytes overwritten anywhere: never another error, never frames that do not fit."""
    path = {"compressed": tmp_path / "a.npz"}.get(kind, tmp_path / f"a.{kind}")
    if kind in ("png", "jpg"):
        path = tmp_path / "images"
        path.mkdir()
        for i in range(2):
            Image.fromarray(frames[i]).save(path / f"{i}.{kind}")
    elif kind == "gif":
        save_gif(path, frames)
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
            read = read_frames(path, 1, 16)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 (reading what is left is right as well)
            refusals += 1
        else:
            assert read.shape[1:] == (1, 16, 16)
            assert float(read.min()) >= 0
            assert float(read.max()) <= 1
    assert refusals >= 50


# --- writing ---


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
