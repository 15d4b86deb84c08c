"""Resize images."""

import numpy as np
import torch
import torch.nn.functional as F

from crevnet.frame_size import FrameSize, height_width

_CHUNK_PIXELS = 2**22
"""Pixels resized at once: bounds the float32 copy to 16 MiB, or one image."""


def resize(images: np.ndarray, size: FrameSize) -> np.ndarray:
    """Resize images by antialiased bicubic interpolation.

    Args:
        images: uint8 or float32 in 0 .. 1, [N, H, W].
        size: the new height and width in pixels, or one number for both.

    Returns:
        [N, height, width] of the same dtype, clipped to 0..255 or 0 .. 1, rounded where integer; `images` itself where
        the size is right already.

    Raises:
        ValueError: `images` is something else, or `size` is below 1.
    """
    if images.ndim != 3 or images.dtype not in (np.uint8, np.float32):
        raise ValueError(f"images must be uint8 or float32 [N, H, W], got {images.dtype} of shape {images.shape}")
    height, width = height_width(size)
    if min(height, width) < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if images.shape[1:] == (height, width):
        return images
    integer = images.dtype == np.uint8
    resized = np.empty((len(images), height, width), images.dtype)
    n = max(1, _CHUNK_PIXELS // (images.shape[1] * images.shape[2]))
    for start in range(0, len(images), n):
        chunk = torch.from_numpy(images[start : start + n]).float().unsqueeze(1)
        smooth = F.interpolate(chunk, (height, width), mode="bicubic", antialias=True, align_corners=False)
        # Bicubic overshoots at edges; a plain cast to uint8 would wrap 256 to black.
        smooth = smooth.round_().clamp_(0, 255) if integer else smooth.clamp_(0, 1)
        resized[start : start + n] = smooth.squeeze(1).numpy()
    return resized


def crop_and_resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crop frames about their centre to the proportions of a size, then resize them to it.

    Args:
        frames: uint8 or float32 in 0 .. 1, [T, C, H, W], not empty.
        size: height and width.

    Returns:
        [T, C, height, width] of the same dtype.
    """
    time, channels, height, width = frames.shape
    rows = min(height, max(1, round(width * size[0] / size[1])))
    columns = min(width, max(1, round(height * size[1] / size[0])))
    top, left = (height - rows) // 2, (width - columns) // 2
    cropped = np.ascontiguousarray(frames[:, :, top : top + rows, left : left + columns])
    return resize(cropped.reshape(-1, rows, columns), size).reshape(time, channels, *size)
