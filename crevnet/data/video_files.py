"""Videos in files: arrays, animated GIFs, folders of images, and what PyAV decodes."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from crevnet.data.errors import DataError
from crevnet.data.resizing import crop_and_resize

ARRAYS = (".npy", ".npz")
FILMS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
IMAGES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
KINDS = "a .npy, .npz, .gif or film file, or a folder of images"

_CHUNK = 16
"""Frames decoded at once: few enough for large frames."""
_IMAGE_MODES = {1: "L", 3: "RGB"}


def find_videos(root: Path) -> list[Path]:
    """The videos at or below a path, in the order of their names.

    Args:
        root: A file, or a folder that is searched with all folders in it. A folder that holds images is one video;
            what begins with a dot is passed over.

    Raises:
        DataError: Nothing there, or no video in it.
    """
    if not root.exists():
        raise DataError(f"{root}: no such file or folder")
    if root.is_file():
        return [root]
    found = sorted(_videos_in(root))
    if not found:
        raise DataError(f"{root}: holds no video, which is {KINDS}")
    return found


def _videos_in(folder: Path) -> Iterator[Path]:
    inside = [p for p in folder.iterdir() if not p.name.startswith(".")]
    if any(map(_is_image, inside)):
        yield folder
    for path in inside:
        if path.is_dir():
            yield from _videos_in(path)
        elif path.suffix.lower() in (*ARRAYS, *FILMS, ".gif"):
            yield path


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in IMAGES and not path.name.startswith(".")


def load_video(path: Path, channels: int, size: tuple[int, int], every: int = 1) -> np.ndarray:
    """Read a video, cropped about its centre and resized.

    Args:
        path: A `.npy` or `.npz` file (its only array, or the one called `frames`) of shape `[T, H, W]`,
            `[T, C, H, W]` or `[T, H, W, C]`, uint8 or floats in 0 .. 1; a `.gif`; a film, which PyAV decodes; or a
            folder of images in the order of their names.
        channels: C; images and films are converted to grey (1) or RGB (3), and turned upright where they say how.
        size: Height and width of the frames returned.
        every: Keep the first of so many frames.

    Returns:
        `[T, C, H, W]`, uint8 or float32 in 0 .. 1.

    Raises:
        DataError: Nothing there, damaged, or something else than frames; names the file.
    """
    parts, seen = [], 0
    for chunk in _read(path, channels):
        kept = chunk[-seen % every :: every]
        seen += len(chunk)
        if len(kept):
            parts.append(crop_and_resize(kept, size))
    if not parts:
        raise DataError(f"{path}: holds no frames")
    return np.concatenate(parts)


def _read(path: Path, channels: int) -> Iterator[np.ndarray]:
    """The frames in pieces `[n, C, H, W]`."""
    kind = path.suffix.lower()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        return _read_images(path, channels)
    if kind == ".gif":
        return _read_gif(path, channels)
    if kind in ARRAYS:
        return _read_array(path, channels)
    if kind in FILMS:
        return _read_film(path, channels)
    raise DataError(f"{path}: a video is {KINDS}")


def _read_array(path: Path, channels: int) -> Iterator[np.ndarray]:
    array = _load_array(path)
    found = array.shape
    if array.ndim == 3:
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
        yield chunk


def _load_array(path: Path) -> np.ndarray:
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


def _read_images(folder: Path, channels: int) -> Iterator[np.ndarray]:
    mode = _image_mode(folder, channels)
    files = sorted(p for p in folder.iterdir() if _is_image(p))
    if not files:
        raise DataError(f"{folder}: the folder holds no images")
    first: tuple[int, ...] | None = None
    for some in _pieces(files):
        images = [_read_image(file, mode) for file in some]
        first = first or images[0].shape
        if any(image.shape != first for image in images):
            raise DataError(f"{folder}: the images have different sizes")
        yield _channels_first(images)


def _read_image(file: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(file) as image:  # of an animation, the first frame
            return np.asarray(ImageOps.exif_transpose(image).convert(mode))
    except Exception as error:  # damage makes the decoders raise almost anything
        raise DataError(f"{file}: not a readable image: {error}") from error


def _read_gif(path: Path, channels: int) -> Iterator[np.ndarray]:
    mode = _image_mode(path, channels)
    try:
        with Image.open(path) as image:
            frames = (np.asarray(frame.convert(mode)) for frame in ImageSequence.Iterator(image))
            yield from map(_channels_first, _pieces(frames))
    except Exception as error:  # damage makes the decoders raise almost anything
        raise DataError(f"{path}: not a readable image: {error}") from error


def _read_film(path: Path, channels: int) -> Iterator[np.ndarray]:
    pixels = {"L": "gray", "RGB": "rgb24"}[_image_mode(path, channels)]
    av = _pyav(path)
    try:
        with av.open(str(path)) as film:
            if not film.streams.video:
                raise ValueError("it has no pictures")
            frames = (_upright(frame.to_ndarray(format=pixels), frame.rotation) for frame in film.decode(video=0))
            yield from map(_channels_first, _pieces(frames))
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


def _image_mode(path: Path, channels: int) -> str:
    if channels not in _IMAGE_MODES:
        raise DataError(f"{path}: images have 1 or 3 channels, the model needs {channels}; give an array file")
    return _IMAGE_MODES[channels]


def _pieces(items: Iterable[Any]) -> Iterator[list[Any]]:
    it = iter(items)
    while piece := list(islice(it, _CHUNK)):
        yield piece


def _channels_first(images: Any) -> np.ndarray:
    """`[H, W]` or `[H, W, C]` each to `[n, C, H, W]`."""
    stacked = np.stack(images)
    return stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
