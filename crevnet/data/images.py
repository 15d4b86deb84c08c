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

    Of 16 bits per pixel the upper ones count; what is transparent lies on black.

    Args:
        folder: The folder.
        channels: C, 1 for grey or 3 for RGB.

    Raises:
        DataError: No image there; one is damaged, holds several frames, or floats or more than 16 bits per pixel;
            names it.
    """
    mode = image_mode(folder, channels)
    files = images_in(folder)
    if not files:
        raise DataError(f"{folder}: the folder holds no images")
    for file in files:
        yield _read_image(file, mode)


def read_gif(path: Path, channels: int) -> Iterator[np.ndarray]:
    """The frames of a GIF, uint8 `[C, H, W]` each; what is transparent lies on black.

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
                yield _pixels(frame, mode)
    except Exception as error:  # damage makes the decoders raise almost anything
        raise DataError(f"{path}: not a readable image: {error}") from error


def channels_first(image: np.ndarray) -> np.ndarray:
    """`[H, W]` or `[H, W, C]` as `[C, H, W]`."""
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


def _read_image(file: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(file) as image:
            # Phones hide a second picture in a .jpg (MPO), which is no frame.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames == 1:
                return _pixels(ImageOps.exif_transpose(image), mode)
    except Exception as error:  # damage makes the decoders raise almost anything
        raise DataError(f"{file}: not a readable image: {error}") from error
    raise DataError(f"{file}: holds {frames} frames; make it a .gif or a film, or save its frames as images")


def _pixels(image: Image.Image, mode: str) -> np.ndarray:
    """uint8 `[C, H, W]`."""
    if image.mode == "F":
        raise ValueError("floats have no known range; give an array file")
    if image.mode.startswith("I"):
        image = _of_bytes(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return channels_first(np.asarray(image.convert(mode)))


def _of_bytes(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8, which Pillow would clip."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("more than 16 bits per pixel; give an array file")
    hidden = image.info.get("transparency")  # the one value that stands for it
    if isinstance(hidden, int):
        values[values == hidden] = 0
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))
