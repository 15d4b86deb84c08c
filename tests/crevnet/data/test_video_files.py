import math
import random
import re
import struct
import sys
import wave
import zipfile

import av
import numpy as np
import pytest
import torch
from PIL import Image

from crevnet.data import DataError, find_videos, load_video, to_tensor, video_files


@pytest.fixture
def frames():
    """uint8 [T, H, W]"""
    return np.random.default_rng(0).integers(0, 256, (5, 16, 16), np.uint8)


def expected(frames):
    return torch.from_numpy(frames.astype(np.float32) / 255)[:, None]


def read(path, channels=1, size=16):
    return to_tensor(load_video(path, channels, (size, size)))


def save_gif(path, frames, mode="L"):
    first, *rest = [Image.fromarray(f).convert(mode) for f in frames]
    first.save(path, save_all=True, append_images=rest, duration=100)


def save_film(path, colours):
    """One frame of 32 x 48 pixels per colour, `[T, 3]`, or image, `[T, 32, 48, 3]`."""
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 48, 32, "yuv420p", 4_000_000
        for colour in colours:
            image = np.ones((32, 48, 1), np.uint8) * colour
            film.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        film.mux(stream.encode())


def refused(path, message, channels=1, size=16):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(path, channels, size)
    assert str(path) in str(error.value)


# --- what can be read ---


def test_npy(tmp_path, frames):
    np.save(tmp_path / "a.npy", frames)
    found = read(tmp_path / "a.npy")
    assert found.dtype == torch.float32
    assert torch.equal(found, expected(frames))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_taken_as_they_are(dtype, tmp_path):
    values = np.linspace(0, 1, 2 * 16 * 16).reshape(2, 16, 16).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    assert torch.equal(read(tmp_path / "a.npy")[:, 0], torch.from_numpy(values.astype(np.float32)))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_with_channels(channels, tmp_path):
    values = np.random.default_rng(1).integers(0, 256, (2, channels, 16, 16), np.uint8)
    np.save(tmp_path / "a.npy", values)
    assert torch.equal(read(tmp_path / "a.npy", channels) * 255, torch.from_numpy(values).float())


def test_npz_with_one_array_whatever_its_name(tmp_path, frames):
    np.savez(tmp_path / "a.npz", digits=frames)
    assert torch.equal(read(tmp_path / "a.npz"), expected(frames))


def test_npz_with_several_arrays_needs_one_called_frames(tmp_path, frames):
    np.savez_compressed(tmp_path / "a.npz", labels=np.arange(5), frames=frames)
    assert torch.equal(read(tmp_path / "a.npz"), expected(frames))
    np.savez(tmp_path / "b.npz", labels=np.arange(5), digits=frames)
    refused(tmp_path / "b.npz", "['labels', 'digits']")


def test_gif(tmp_path, frames):
    save_gif(tmp_path / "a.gif", frames)
    assert torch.equal(read(tmp_path / "a.gif"), expected(frames))


def test_gif_in_capitals(tmp_path, frames):
    save_gif(tmp_path / "A.GIF", frames)
    assert torch.equal(read(tmp_path / "A.GIF"), expected(frames))


def test_a_gif_whose_frames_are_stored_as_differences(tmp_path):
    """Encoders store only what changes from frame to frame: each must come back whole."""
    moving = np.zeros((4, 16, 16), np.uint8)
    for t in range(4):
        moving[t, 4:8, 2 * t : 2 * t + 4] = 255
    save_gif(tmp_path / "a.gif", moving)
    assert torch.equal(read(tmp_path / "a.gif"), expected(moving))


def test_images_in_a_folder_are_read_in_the_order_of_their_names(tmp_path, frames):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in (3, 0, 4, 2, 1):
        Image.fromarray(frames[i]).save(folder / f"frame-{i}.png")
    (folder / ".DS_Store").write_bytes(b"not a frame")
    assert torch.equal(read(folder), expected(frames))


def test_colour_images_are_converted_to_grey_and_back(tmp_path, frames):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.stack([frames[0]] * 3, axis=-1)).save(folder / "0.png")
    Image.fromarray(frames[1]).save(folder / "1.png")
    assert torch.equal(read(folder), expected(frames[:2]))
    assert torch.equal(read(folder, 3), expected(frames[:2]).expand(-1, 3, -1, -1))


def test_the_channels_of_colour_images_stay_in_order(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[..., 0], pixels[2, 5, 1], pixels[..., 2] = 255, 51, 102
    Image.fromarray(pixels).save(folder / "0.png")
    assert torch.equal(read(folder, 3)[0], torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


def test_what_is_no_image_in_a_folder_is_passed_over(tmp_path, frames):
    Image.fromarray(frames[0]).save(tmp_path / "0.PNG")
    (tmp_path / "timestamps.txt").write_text("hello")
    assert torch.equal(read(tmp_path), expected(frames[:1]))


def test_arrays_with_channels_last(tmp_path):
    values = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)
    np.save(tmp_path / "a.npy", values)
    assert torch.equal(read(tmp_path / "a.npy", 3) * 255, torch.from_numpy(values).permute(0, 3, 1, 2).float())


def test_a_film(tmp_path):
    """Compressed with loss: near, and in order; colours as in the images it was made of."""
    path = tmp_path / "a.mp4"
    save_film(path, colours := np.random.default_rng(0).integers(30, 220, (20, 3), np.uint8))
    found = read(path, 3, 16)
    assert found.shape == (20, 3, 16, 16)
    assert (found.mean((2, 3)) * 255 - torch.from_numpy(colours).float()).abs().max() < 12
    grey = read(path, 1, 16)
    luma = torch.from_numpy(colours @ np.array([0.299, 0.587, 0.114]))
    assert (grey.mean((1, 2, 3)) * 255 - luma).abs().max() < 22  # of a film grey is its luma, 16 .. 235


def corners(degrees):
    """`[32, 48, 3]` with a colour for each quarter, and the colours of the quarters when it is turned clockwise."""
    quarters = np.array([[[250, 30, 30], [30, 250, 30]], [[30, 30, 250], [250, 250, 250]]], np.uint8)
    return quarters.repeat(16, 0).repeat(24, 1), np.rot90(quarters, -degrees // 90)


def quarters_of(found):
    """The colours of the quarters of the first of `[T, 3, H, W]`."""
    return found[0].unflatten(2, (2, -1)).unflatten(1, (2, -1)).mean((2, 4)).permute(1, 2, 0) * 255


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_film_of_a_phone_is_turned_upright(degrees, tmp_path):
    """Its track's matrix, 16.16 fixed point, says how far to turn the frames clockwise."""
    path = tmp_path / "a.mp4"
    image, turned = corners(degrees)
    save_film(path, [image] * 2)
    data = bytearray(path.read_bytes())
    cosine, sine = round(math.cos(math.radians(degrees))), round(math.sin(math.radians(degrees)))
    matrix = [x << 16 for x in (cosine, sine, 0, -sine, cosine)]
    start = data.index(b"tkhd") + 44
    data[start : start + 20] = struct.pack(">5i", *matrix)
    path.write_bytes(data)
    assert (quarters_of(read(path, 3, 16)) - torch.from_numpy(turned.copy())).abs().max() < 30


@pytest.mark.parametrize(("orientation", "degrees"), [(1, 0), (6, 90), (3, 180), (8, 270)])
def test_photographs_are_turned_upright(orientation, degrees, tmp_path):
    image, turned = corners(degrees)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(image).save(tmp_path / "0.png", exif=exif)
    assert (quarters_of(read(tmp_path, 3, 16)) - torch.from_numpy(turned.copy())).abs().max() < 30


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


# --- finding ---


def test_videos_are_found_in_all_folders_in_the_order_of_their_names(tmp_path, frames):
    drive, hidden = tmp_path / "b" / "drive" / "data", tmp_path / ".cache"
    for folder in (drive, hidden, tmp_path / "empty"):
        folder.mkdir(parents=True)
    Image.fromarray(frames[0]).save(drive / "0.png")
    np.save(hidden / "x.npy", frames)
    np.save(tmp_path / "c.npy", frames)
    (tmp_path / "b" / "a.NPZ").write_bytes(b"")
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "readme.txt").write_text("hello")
    found = [tmp_path / "a.mp4", tmp_path / "b" / "a.NPZ", drive, tmp_path / "c.npy"]
    assert find_videos(tmp_path) == found
    assert find_videos(drive) == [drive]
    assert find_videos(tmp_path / "c.npy") == [tmp_path / "c.npy"]
    with pytest.raises(DataError, match=r"empty: holds no video, which is a \.npy"):
        find_videos(tmp_path / "empty")


# --- what is refused ---


def test_a_film_without_pyav(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    refused(tmp_path / "a.mp4", "reading films needs PyAV: pip install av", channels=3)


def test_a_film_of_sound_alone_or_none(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    refused(tmp_path / "a.mp4", "not a readable film", channels=3)
    path = tmp_path / "b.mp4"
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    refused(path, "not a readable film: it has no pictures", channels=3)


def test_nothing_there(tmp_path):
    for function in (read, find_videos):
        with pytest.raises(DataError, match=r"a\.npy: no such file"):
            function(tmp_path / "a.npy")


def test_an_unknown_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x")
    refused(tmp_path / "a.txt", "a video is a .npy, .npz, .gif or film file, or a folder of images")


@pytest.mark.parametrize("shape", [(5, 3, 16, 16), (16, 16), (5,), (), (2, 5, 1, 16, 16)])
def test_a_wrong_shape(shape, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    wanted = "but 1 channel(s) take [T, 1, H, W], [T, H, W] or [T, H, W, 1]"
    refused(tmp_path / "a.npy", f"an array of shape {shape}, {wanted}")


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
    refused(tmp_path, "the folder holds no images")


def test_images_of_different_sizes(tmp_path, frames):
    Image.fromarray(frames[0]).save(tmp_path / "0.png")
    Image.fromarray(frames[1][:8]).save(tmp_path / "1.png")
    refused(tmp_path, "the images have different sizes")


def test_images_for_a_model_with_other_channels(tmp_path, frames):
    save_gif(tmp_path / "a.gif", frames)
    refused(tmp_path / "a.gif", "images have 1 or 3 channels, the model needs 4", channels=4)


@pytest.mark.parametrize("kind", ["npy", "npz", "compressed", "gif", "png", "jpg", "mp4"])
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
    elif kind == "mp4":
        save_film(path, np.random.default_rng(0).integers(0, 256, (3, 3), np.uint8))
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
            found = read(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 (reading what is left is right as well)
            refusals += 1
        else:
            assert found.shape[1:] == (1, 16, 16)
            assert float(found.min()) >= 0
            assert float(found.max()) <= 1
    assert refusals >= 50
