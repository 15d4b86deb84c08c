import zipfile

import numpy as np
import pytest
import torch

from crevnet.data import load_video


def test_npy(videos, tmp_path, frames):
    np.save(tmp_path / "a.npy", frames)
    found = videos.read(tmp_path / "a.npy")
    assert found.dtype == torch.float32
    assert torch.equal(found, videos.expected(frames))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_taken_as_they_are(videos, dtype, tmp_path):
    values = np.linspace(0, 1, 2 * 16 * 16).reshape(2, 16, 16).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    assert torch.equal(videos.read(tmp_path / "a.npy")[:, 0], torch.from_numpy(values.astype(np.float32)))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_with_channels(videos, channels, tmp_path):
    values = np.random.default_rng(1).integers(0, 256, (2, channels, 16, 16), np.uint8)
    np.save(tmp_path / "a.npy", values)
    assert torch.equal(videos.read(tmp_path / "a.npy", channels) * 255, torch.from_numpy(values).float())


def test_arrays_with_channels_last(videos, tmp_path):
    values = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)
    np.save(tmp_path / "a.npy", values)
    assert torch.equal(videos.read(tmp_path / "a.npy", 3) * 255, torch.from_numpy(values).permute(0, 3, 1, 2).float())


def test_npz_with_one_array_whatever_its_name(videos, tmp_path, frames):
    np.savez(tmp_path / "a.npz", digits=frames)
    assert torch.equal(videos.read(tmp_path / "a.npz"), videos.expected(frames))


def test_npz_with_several_arrays_needs_one_called_frames(videos, tmp_path, frames):
    np.savez_compressed(tmp_path / "a.npz", labels=np.arange(5), frames=frames)
    assert torch.equal(videos.read(tmp_path / "a.npz"), videos.expected(frames))
    np.savez(tmp_path / "b.npz", labels=np.arange(5), digits=frames)
    videos.refused(tmp_path / "b.npz", "['labels', 'digits']")


# --- what is refused ---


@pytest.mark.parametrize("shape", [(5, 3, 16, 16), (16, 16), (5,), (), (2, 5, 1, 16, 16)])
def test_a_wrong_shape(videos, shape, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    wanted = "but 1 channel(s) take [T, 1, H, W], [T, H, W] or [T, H, W, 1]"
    videos.refused(tmp_path / "a.npy", f"an array of shape {shape}, {wanted}")


@pytest.mark.parametrize("shape", [(40, 16, 3), (40, 16, 4), (2, 2, 3)])
def test_what_may_be_one_image_in_colour(videos, shape, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.save(tmp_path / "a.npy", values)
    wanted = (
        f"an array of shape {shape} may be one image in colour, or frames {shape[2]} pixels wide; give [T, 1, H, W]"
    )
    videos.refused(tmp_path / "a.npy", wanted)
    np.save(tmp_path / "a.npy", values[:, None])
    assert (load_video(tmp_path / "a.npy", 1, shape[1:]) == values[:, None]).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_no_frames(videos, dtype, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((0, 16, 16), dtype))
    videos.refused(tmp_path / "a.npy", "holds no frames")


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex64, "U3"])
def test_a_wrong_type(videos, dtype, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 16, 16), dtype))
    videos.refused(tmp_path / "a.npy", "frames must be uint8 or floats in 0 .. 1")


@pytest.mark.parametrize("value", [-0.01, 1.01, 255, np.nan, np.inf])
def test_floats_out_of_range(videos, value, tmp_path):
    values = np.zeros((2, 16, 16), np.float32)
    values[1, 3, 3] = value
    np.save(tmp_path / "a.npy", values)
    videos.refused(tmp_path / "a.npy", "float frames must be finite and in 0 .. 1")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_pickles_are_refused_unread(videos, suffix, tmp_path):
    save = {"npy": np.save, "npz": np.savez}[suffix]
    save(tmp_path / f"a.{suffix}", np.array([Bomb()], dtype=object))
    videos.refused(tmp_path / f"a.{suffix}", "not a readable array file")


def test_an_archive_without_arrays(videos, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as z:
        z.writestr("readme.txt", "hello")
    videos.refused(tmp_path / "a.npz", "not a readable array file: holds no array")
    with zipfile.ZipFile(tmp_path / "b.npz", "w"):
        pass
    videos.refused(tmp_path / "b.npz", "not a readable array file")
