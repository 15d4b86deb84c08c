import math
import re
import struct
import sys
import wave
from fractions import Fraction

import numpy as np
import pytest
import torch

from crevnet.data import load_video


def test_a_film(videos, tmp_path):
    """Compressed with loss: near, and in order; colours as in the images it was made of."""
    path = tmp_path / "a.mp4"
    videos.save_film(path, colours := np.random.default_rng(0).integers(30, 220, (20, 3), np.uint8))
    found = videos.read(path, 3, 16)
    assert found.shape == (20, 3, 16, 16)
    assert (found.mean((2, 3)) * 255 - torch.from_numpy(colours).float()).abs().max() < 12
    grey = videos.read(path, 1, 16)
    luma = torch.from_numpy(colours @ np.array([0.299, 0.587, 0.114]))
    assert (grey.mean((1, 2, 3)) * 255 - luma).abs().max() < 22  # of a film grey is its luma, 16 .. 235


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_film_of_a_phone_is_turned_upright(videos, degrees, tmp_path):
    """Its track's matrix, 16.16 fixed point, says how far to turn the frames clockwise."""
    path = tmp_path / "a.mp4"
    image, turned = videos.corners(degrees)
    videos.save_film(path, [image] * 2)
    data = bytearray(path.read_bytes())
    cosine, sine = round(math.cos(math.radians(degrees))), round(math.sin(math.radians(degrees)))
    matrix = [x << 16 for x in (cosine, sine, 0, -sine, cosine)]
    start = data.index(b"tkhd") + 44
    data[start : start + 20] = struct.pack(">5i", *matrix)
    path.write_bytes(data)
    assert (videos.quarters_of(videos.read(path, 3, 16)) - torch.from_numpy(turned.copy())).abs().max() < 30


@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(16, 11)])
@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_an_anamorphic_film_is_stretched_to_square_pixels_before_it_is_cropped(videos, aspect, kind, tmp_path):
    """Columns that grow brighter evenly: what is seen at both sides tells what was cropped away."""
    path = tmp_path / f"a.{kind}"
    image = np.linspace(30, 220, 48).round().astype(np.uint8)[:, None] * np.ones((32, 48, 3), np.uint8)
    videos.save_film(path, [image] * 2, aspect=aspect)
    columns = load_video(path, 3, (16, 16))[0, 0].mean(0)
    part = min(1, 32 / float(48 * aspect))  # of the width, that a square about the centre has
    first, last = (125 + (side * part) * 95 for side in (-15 / 16, 15 / 16))
    assert columns[[0, -1]] == pytest.approx([first, last], abs=8)


def film_of_sixty(videos, path):
    """Sixty frames of noise, the length at the front."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 48, 3), np.uint8)
    codec = {"webm": "libvpx"}.get(path.suffix[1:], "mpeg4")
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else None
    videos.save_film(path, noise, codec=codec, options=options)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm"])
def test_a_film_that_was_cut_off_is_told_of(videos, kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    film_of_sixty(videos, path)
    assert len(load_video(path, 3, (16, 16))) == 60  # a warning would be an error here
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.warns(RuntimeWarning, match=rf"{re.escape(str(path))}: \d+ frames decoded, .* announces 60; it may"):
        found = load_video(path, 3, (16, 16))
    assert 15 < len(found) < 40
    assert len(load_video(path, 3, (16, 16), limit=15)) == 15  # no more was asked for


def test_a_film_that_is_trimmed_by_an_edit_list_is_whole(videos, tmp_path):
    """Phones trim without writing the frames anew: the file counts all of them, but says which to show."""
    path = tmp_path / "a.mp4"
    film_of_sixty(videos, path)
    data = bytearray(path.read_bytes())
    start = data.index(b"elst") + 12  # after its version and count: how long, and from where
    (duration,) = struct.unpack(">I", data[start : start + 4])
    data[start : start + 4] = struct.pack(">I", duration // 2)
    path.write_bytes(data)
    assert len(load_video(path, 3, (16, 16))) == 30


# --- what is refused ---


@pytest.mark.parametrize("frames", [16, 10])
def test_a_size_that_changes_within_a_film(videos, frames, tmp_path):
    """Streams of MPEG may be put one after the other; 16 frames are read at once."""
    for i, size in enumerate([(32, 48), (64, 48)]):
        videos.save_film(tmp_path / f"{i}.mpg", np.full((frames, 3), 90, np.uint8), codec="mpeg2video", size=size)
    path = tmp_path / "a.mpg"
    path.write_bytes((tmp_path / "0.mpg").read_bytes() + (tmp_path / "1.mpg").read_bytes())
    videos.refused(path, "the frames have different sizes: 32 x 48 pixels first, then 64 x 48", channels=3)


def test_pixels_of_absurd_proportions(videos, tmp_path):
    path = tmp_path / "a.mkv"
    videos.save_film(path, np.full((2, 3), 90, np.uint8), aspect=Fraction(20))
    videos.refused(path, "not a readable film: its pixels have the proportions 20 : 1", channels=3)


def test_a_film_without_pyav(videos, tmp_path, monkeypatch):
    (tmp_path / "a.mkv").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    videos.refused(tmp_path / "a.mkv", "reading films needs PyAV: pip install av", channels=3)


def test_a_film_of_sound_alone_or_none(videos, tmp_path):
    (tmp_path / "a.mkv").write_bytes(b"")
    videos.refused(tmp_path / "a.mkv", "not a readable film", channels=3)
    path = tmp_path / "b.mp4"
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    videos.refused(path, "not a readable film: it has no pictures", channels=3)
