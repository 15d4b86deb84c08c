"""Videos of all kinds to write, and what is to be read from them."""

import re
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from crevnet.data import load_video, to_tensor


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


def save_film(path, colours, *, codec="mpeg4", size=(32, 48), aspect=None, options=None):
    """One frame per colour, `[T, 3]`, or image, `[T, H, W, 3]`.

    Args:
        path: The file.
        colours: Colours or images.
        codec: What compresses.
        size: Height and width.
        aspect: Width of a pixel over its height.
        options: Those of the container.
    """
    with av.open(str(path), "w", format="mpegts" if path.suffix == ".mpg" else None, options=options or {}) as film:
        stream = film.add_stream(codec, rate=10)
        (stream.height, stream.width), stream.pix_fmt, stream.bit_rate = size, "yuv420p", 4_000_000
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for colour in colours:
            image = np.ones((*size, 1), np.uint8) * colour
            film.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        film.mux(stream.encode())


def refused(path, message, channels=1, size=16):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(path, channels, size)
    assert str(path) in str(error.value)


def corners(degrees):
    """`[32, 48, 3]` with a colour for each quarter, and the colours of the quarters when it is turned clockwise."""
    quarters = np.array([[[250, 30, 30], [30, 250, 30]], [[30, 30, 250], [250, 250, 250]]], np.uint8)
    return quarters.repeat(16, 0).repeat(24, 1), np.rot90(quarters, -degrees // 90)


def quarters_of(found):
    """The colours of the quarters of the first of `[T, 3, H, W]`."""
    return found[0].unflatten(2, (2, -1)).unflatten(1, (2, -1)).mean((2, 4)).permute(1, 2, 0) * 255


@pytest.fixture(scope="session")
def videos():
    """Files to write, and how to read them."""
    return SimpleNamespace(
        expected=expected,
        read=read,
        save_gif=save_gif,
        save_film=save_film,
        refused=refused,
        corners=corners,
        quarters_of=quarters_of,
    )
