"""Straight motion between elastic walls, in closed form."""

import numpy as np


def fold(position: np.ndarray, span: float) -> np.ndarray:
    """Reflect free positions into [0, span], as a point that bounces elastically off both ends moves.

    Unfolding the reflections makes the motion straight, so folding is a triangle wave of period 2*span:
    span - |position mod 2*span - span|.

    Args:
        position: float64, any shape, any sign.
        span: distance between the walls, at least 0; with 0 the result is 0 everywhere.

    Returns:
        float64, the shape of `position`, in [0, span].
    """
    if span == 0:
        return np.zeros_like(position)
    return span - np.abs(np.mod(position, 2 * span) - span)


def bouncing_pixels(start: np.ndarray, velocity: np.ndarray, frames: int, span: int) -> np.ndarray:
    """Return the whole-pixel position in frames 0, 1, ... of points that bounce between 0 and `span`.

    Args:
        start: float64 [...], position in frame 0, pixels.
        velocity: float64 [...], pixels per frame.
        frames: number of frames T.
        span: largest position, pixels.

    Returns:
        int64 [..., T] in 0..span: fold(start + velocity * t), rounded.
    """
    free = start[..., None] + velocity[..., None] * np.arange(frames, dtype=np.float64)
    return np.rint(fold(free, span)).astype(np.int64)
