"""Frames in array files."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from crevnet.data.errors import DataError

_CHUNK = 16
"""Frames read and checked at once: few enough for large frames."""


def read_array(path: Path, channels: int) -> Iterator[np.ndarray]:
    """The frames of a `.npy` or `.npz` file (its only array, or the one called `frames`), one by one.

    Args:
        path: The file; its array is `[T, H, W]`, `[T, C, H, W]` or `[T, H, W, C]`, uint8 or floats in 0 .. 1. Of
            `[T, H, W]` W is not 3 or 4: that would rather be one image in colour.
        channels: C.

    Yields:
        `[C, H, W]`, uint8 or float32 in 0 .. 1.

    Raises:
        DataError: Damaged, or something else than such frames; names the file.
    """
    array = _load(path)
    found = array.shape
    if array.ndim == 3:
        if channels == 1 and found[2] in (3, 4):
            raise DataError(
                f"{path}: an array of shape {found} may be one image in colour, or frames {found[2]} pixels wide; give "
                "[T, 1, H, W] or [T, H, W, 1]"
            )
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] != channels and array.shape[3] == channels:
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] != channels:
        grey = ", [T, H, W]" if channels == 1 else ""
        raise DataError(
            f"{path}: an array of shape {found}, but {channels} channel(s) take [T, {channels}, H, W]{grey} or "
            f"[T, H, W, {channels}]"
        )
    if array.size == 0:
        raise DataError(f"{path}: holds no frames")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{path}: frames must be uint8 or floats in 0 .. 1, got {array.dtype}")
    for start in range(0, len(array), _CHUNK):
        chunk = np.array(array[start : start + _CHUNK])
        if chunk.dtype != np.uint8:
            chunk = chunk.astype(np.float32)
            if not np.isfinite(chunk).all() or chunk.min() < 0 or chunk.max() > 1:
                raise DataError(f"{path}: float frames must be finite and in 0 .. 1")
        yield from chunk


def _load(path: Path) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r")
        if isinstance(loaded, np.ndarray):
            array = loaded
        else:
            with loaded:
                names = list(loaded.keys())
                if "frames" not in names and len(names) != 1:
                    raise ValueError(f"holds the arrays {names}; name the frames 'frames'")
                array = loaded["frames" if "frames" in names else names[0]]
        if not isinstance(array, np.ndarray):
            raise ValueError("holds no array")
    except Exception as error:  # damage makes the decoders raise almost anything
        raise DataError(f"{path}: not a readable array file: {error}") from error
    return array
