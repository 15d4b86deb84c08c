"""Frames of films, which PyAV decodes."""

import re
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from crevnet.data.errors import DataError
from crevnet.data.images import channels_first, image_mode

_PIXELS = {"L": "gray", "RGB": "rgb24"}
_MOST_OBLONG = 8
"""Pixels of films are at most about twice as wide as high; what lies far beyond is damage."""
_FEW = 3
"""Frames that a whole film may have less than it announces: encoders count differently at its ends."""
_TAG = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")


def read_film(path: Path, channels: int) -> Iterator[np.ndarray]:
    """The frames of a film, upright and with square pixels, uint8 `[C, H, W]` each.

    A RuntimeWarning tells of a film that ends before the length that it announces, once its last frame is read.

    Args:
        path: The file.
        channels: C, 1 for grey or 3 for RGB.

    Raises:
        DataError: Damaged, without pictures, or PyAV is missing; names the file.
    """
    pixels = _PIXELS[image_mode(path, channels)]
    av = _pyav(path)
    decoded, end = 0, 0.0
    try:
        with av.open(str(path)) as film:
            if not film.streams.video:
                raise ValueError("it has no pictures")
            stream = film.streams.video[0]
            aspect = _pixel_aspect(stream)
            for frame in film.decode(stream):
                width = max(1, round(frame.width * aspect))
                image = frame.to_ndarray(format=pixels, width=width, height=frame.height)
                decoded, end = decoded + 1, frame.time or end
                yield channels_first(_upright(image, frame.rotation))
            announced = _announced(film, stream, end)
    except Exception as error:  # damage makes the decoders raise almost anything
        raise DataError(f"{path}: not a readable film: {error}") from error
    if announced is not None and decoded + _FEW < announced:
        warnings.warn(
            f"{path}: {decoded} frames decoded, but the film announces {announced}; it may have been cut off, such as "
            "by a copy or a recording that was interrupted",
            RuntimeWarning,
            stacklevel=2,
        )


def _pixel_aspect(stream: Any) -> Fraction:
    """Width of a pixel over its height: anamorphic films are shown wider, or narrower, than they are stored."""
    aspect = stream.sample_aspect_ratio or Fraction(1)  # None or 0 where it does not say
    if not Fraction(1, _MOST_OBLONG) <= aspect <= _MOST_OBLONG:
        raise ValueError(f"its pixels have the proportions {aspect.numerator} : {aspect.denominator}")
    return aspect


def _announced(film: Any, stream: Any, end: float) -> int | None:
    """The frames that a film should have, None where it does not say.

    Args:
        film: The file.
        stream: Its pictures.
        end: When the last decoded frame is shown, seconds.
    """
    kind, rate = film.format.name, float(stream.average_rate or 0)
    seconds = _seconds(film, stream)
    by_time = round(seconds * rate) if seconds and rate else None
    if stream.frames:
        # An .mp4 counts the frames that its edit list leaves out as well, but its duration does not.
        return min(stream.frames, by_time or stream.frames) if kind.startswith("mov") else stream.frames
    # In other kinds the duration is a guess by the size of the file.
    if seconds is None or by_time is None or not kind.startswith(("mov", "matroska")):
        return None
    # Where the rate varies, its average may be wrong; the time at which the frames end is not.
    begin = float((stream.start_time or 0) * stream.time_base)
    return by_time if end - begin + (_FEW + 1) / rate < seconds else None


def _seconds(film: Any, stream: Any) -> float | None:
    """How long the pictures last; sound may go on for longer."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if tag := _TAG.match(stream.metadata.get("DURATION", "")):  # of .mkv and .webm
        hours, minutes, seconds = map(float, tag.groups())
        return 3600 * hours + 60 * minutes + seconds
    return film.duration / 1e6 if film.duration else None


def _upright(image: np.ndarray, rotation: int) -> np.ndarray:
    """Phones film as they are held and write down how far to turn the frames, in degrees against the clock."""
    return np.rot90(image, round(rotation / 90))


def _pyav(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(f"{path}: reading films needs PyAV: pip install av") from error
    return av
