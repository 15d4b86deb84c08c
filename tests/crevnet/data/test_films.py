import math
import struct
import sys
import wave

import numpy as np
import pytest
import torch


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


# --- what is refused ---


def test_a_film_without_pyav(videos, tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    videos.refused(tmp_path / "a.mp4", "reading films needs PyAV: pip install av", channels=3)


def test_a_film_of_sound_alone_or_none(videos, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    videos.refused(tmp_path / "a.mp4", "not a readable film", channels=3)
    path = tmp_path / "b.mp4"
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    videos.refused(path, "not a readable film: it has no pictures", channels=3)
