"""Videos in files, whatever their kind, at the size of a model's frames."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from crevnet.data.array_files import read_array
from crevnet.data.errors import DataError
from crevnet.data.films import read_film
from crevnet.data.images import read_gif, read_images
from crevnet.data.resizing import crop_and_resize
from crevnet.data.video_search import ARRAYS, FILMS, KINDS

_CHUNK = 16
"""Frames resized at once: few enough for large frames."""


def load_video(
    path: Path, channels: int, size: tuple[int, int], every: int = 1, limit: int | None = None
) -> np.ndarray:
    """Read a video, cropped about its centre and resized.

    Args:
        path: A `.npy` or `.npz` file (its only array, or the one called `frames`) of shape `[T, H, W]` (W not 3 or 4),
            `[T, C, H, W]` or `[T, H, W, C]`, uint8 or floats in 0 .. 1; a `.gif`; a film, which PyAV decodes; or a
            folder of images in the order of their names, numbers in them by value.
        channels: C; images and films are converted to grey (1) or RGB (3), and turned upright where they say how;
            the pixels of films are made square, what is transparent lies on black.
        size: Height and width of the frames returned.
        every: Keep the first of so many frames.
        limit: Stop after so many frames that are kept, without reading on; None for all.

    Returns:
        `[T, C, H, W]`, uint8 or float32 in 0 .. 1.

    Raises:
        DataError: Nothing there, damaged, or something else than frames, all of one size; names the file.
        ValueError: `every` or `limit` is below 1.
    """
    for name, value in (("every", every), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    frames = islice(_read(path, channels), 0, None if limit is None else (limit - 1) * every + 1, every)
    parts: list[np.ndarray] = []
    first: tuple[int, ...] | None = None
    while piece := list(islice(frames, _CHUNK)):
        first = first or piece[0].shape
        for frame in piece:
            if frame.shape != first:
                raise DataError(
                    f"{path}: the frames have different sizes: {first[1]} x {first[2]} pixels first, then "
                    f"{frame.shape[1]} x {frame.shape[2]}"
                )
        parts.append(crop_and_resize(np.stack(piece), size))
    if not parts:
        raise DataError(f"{path}: holds no frames")
    return np.concatenate(parts)


def _read(path: Path, channels: int) -> Iterator[np.ndarray]:
    """The frames one by one, `[C, H, W]`."""
    kind = path.suffix.lower()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        return read_images(path, channels)
    if kind == ".gif":
        return read_gif(path, channels)
    if kind in ARRAYS:
        return read_array(path, channels)
    if kind in FILMS:
        return read_film(path, channels)
    raise DataError(f"{path}: a video is {KINDS}")
