"""Frames from and to files: NumPy arrays, GIFs, folders of images."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor


def read_frames(path: Path, channels: int, image_size: int) -> Tensor:
    """Read a sequence as `[T, C, H, W]`, float32 in 0 .. 1.

    Args:
        path: `.npy` or `.npz` (its only array, or the one called `frames`) of shape `[T, H, W]` or `[T, C, H, W]`,
            uint8 or floats in 0 .. 1; a `.gif`; or a folder of images in the order of their names.
        channels: C that is expected; images are converted to grey (1) or RGB (3).
        image_size: Height and width that are expected.

    Raises:
        FileNotFoundError: Nothing there.
        ValueError: The content does not fit; says what was found.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir() or path.suffix.lower() == ".gif":
        frames = _read_images(path, channels)
    elif path.suffix.lower() in (".npy", ".npz"):
        frames = _read_array(path)
    else:
        raise ValueError(f"{path}: a sequence is a .npy, .npz or .gif file, or a folder of images")
    expected = (channels, image_size, image_size)
    if frames.ndim != 4 or frames.shape[1:] != expected:
        raise ValueError(
            f"{path}: frames of shape {frames.shape[1:]} found, the model needs {expected}; resize them first"
        )
    if len(frames) == 0:
        raise ValueError(f"{path}: holds no frames")
    return _to_unit_range(frames, path)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a compressed `.npz`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as f:
        np.savez_compressed(f, **arrays)  # type: ignore[arg-type]
    os.replace(part, path)


def _read_array(path: Path) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
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
        raise ValueError(f"{path}: not a readable array file: {error}") from error
    return array[:, None] if array.ndim == 3 else array


def _read_images(path: Path, channels: int) -> np.ndarray:
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise ValueError(f"{path}: images have 1 or 3 channels, the model needs {channels}; give an array file")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        if not files:
            raise ValueError(f"{path}: the folder is empty")
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                # Of an animation in a folder, the first frame.
                found = [image] if path.is_dir() else ImageSequence.Iterator(image)
                images += [np.asarray(frame.convert(mode)) for frame in found]
        except Exception as error:  # damage makes the decoders raise almost anything
            raise ValueError(f"{file}: not a readable image: {error}") from error
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"{path}: the images have different sizes")
    stacked = np.stack(images)
    return stacked[:, None] if channels == 1 else stacked.transpose(0, 3, 1, 2)


def _to_unit_range(frames: np.ndarray, path: Path) -> Tensor:
    if frames.dtype == np.uint8:
        return torch.from_numpy(frames.astype(np.float32) / 255)
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"{path}: frames must be uint8 or floats in 0 .. 1, got {frames.dtype}")
    values = frames.astype(np.float32)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise ValueError(f"{path}: float frames must be finite and in 0 .. 1")
    return torch.from_numpy(values)
