"""Frames in image files: a folder of them, or a GIF."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from crevnet.data.errors import DataError
from crevnet.data.video_search import images_in

_MODES = {1: "L", 3: "RGB"}


def image_mode(path: Path, channels: int) -> str:
    """What Pillow calls grey (1 channel) or colour (3).

    Raises:
        DataError: Another number of channels; names the path.
    """
    if channels not in _MODES:
        raise DataError(f"{path}: images have 1 or 3 channels, the model needs {channels}; give an array file")
    return _MODES[channels]


def read_images(folder: Path, channels: int) -> Iterator[np.ndarray]:
    """The images in a folder in the order of their names, upright, uint8 `[C, H, W]` each.

    Args:
        folder: The folder.
        channels: C, 1 for grey or 3 for RGB.

    Raises:
        DataError: No image there, or one is damaged; names it.
    """
    mode = image_mode(folder, channels)
    files = images_in(folder)
    if not files:
        raise DataError(f"{folder}: the folder holds no images")
    for file in files:
        yield _read_image(file, mode)


def read_gif(path: Path, channels: int) -> Iterator[np.ndarray]:
    """The frames of a GIF, uint8 `[C, H, W]` each.

    Args:
        path: The file.
        channels: C, 1 for grey or 3 for RGB.

    Raises:
        DataError: Damaged; names the file.
    """
    mode = image_mode(path, channels)
    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                yield channels_first(np.asarray(frame.convert(mode)))
    except Exception as error:  # damage makes the decoders raise almost anything
        raise DataError(f"{path}: not a readable image: {error}") from error


def channels_first(image: np.ndarray) -> np.ndarray:
    """`[H, W]` or `[H, W, C]` as `[C, H, W]`."""
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


def _read_image(file: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(file) as image:  # of an animation, the first frame
            return channels_first(np.asarray(ImageOps.exif_transpose(image).convert(mode)))
    except Exception as error:  # damage makes the decoders raise almost anything
        raise DataError(f"{file}: not a readable image: {error}") from error
