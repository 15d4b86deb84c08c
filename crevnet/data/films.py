"""Frames of films, which PyAV decodes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crevnet.data.errors import DataError
from crevnet.data.images import channels_first, image_mode

_PIXELS = {"L": "gray", "RGB": "rgb24"}


def read_film(path: Path, channels: int) -> Iterator[np.ndarray]:
    """The frames of a film, upright, uint8 `[C, H, W]` each.

    Args:
        path: The file.
        channels: C, 1 for grey or 3 for RGB.

    Raises:
        DataError: Damaged, without pictures, or PyAV is missing; names the file.
    """
    pixels = _PIXELS[image_mode(path, channels)]
    av = _pyav(path)
    try:
        with av.open(str(path)) as film:
            if not film.streams.video:
                raise ValueError("it has no pictures")
            for frame in film.decode(video=0):
                yield channels_first(_upright(frame.to_ndarray(format=pixels), frame.rotation))
    except Exception as error:  # damage makes the decoders raise almost anything
        raise DataError(f"{path}: not a readable film: {error}") from error


def _upright(image: np.ndarray, rotation: int) -> np.ndarray:
    """Phones film as they are held and write down how far to turn the frames, in degrees against the clock."""
    return np.rot90(image, round(rotation / 90))


def _pyav(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(f"{path}: reading films needs PyAV: pip install av") from error
    return av
