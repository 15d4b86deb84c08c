"""Resize digit images."""

import numpy as np
import torch
import torch.nn.functional as F

_CHUNK = 4096
"""Images resized at once: bounds the float32 copy to 13 MB per 28x28 chunk."""


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resize square or oblong images to `size` x `size` by antialiased bicubic interpolation.

    Args:
        images: uint8 [N, H, W].
        size: the new height and width in pixels.

    Returns:
        uint8 [N, size, size], rounded and clipped to 0..255; `images` itself where the size is right already.

    Raises:
        ValueError: `images` is not uint8 [N, H, W], or `size` is below 1.
    """
    if images.ndim != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 [N, H, W], got {images.dtype} of shape {images.shape}")
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if images.shape[1:] == (size, size):
        return images
    resized = np.empty((len(images), size, size), np.uint8)
    for start in range(0, len(images), _CHUNK):
        chunk = torch.from_numpy(images[start : start + _CHUNK]).float().unsqueeze(1)
        smooth = F.interpolate(chunk, (size, size), mode="bicubic", antialias=True, align_corners=False)
        # Bicubic overshoots at edges; a plain cast to uint8 would wrap 256 to black.
        resized[start : start + _CHUNK] = smooth.round_().clamp_(0, 255).squeeze(1).numpy()
    return resized
