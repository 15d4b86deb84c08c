"""Moving MNIST, generated on the fly.

Shapes: B sequences, T frames, H = W = image_size, K digits per sequence, D = digit_size.
"""

import math
import sys

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from crevnet.data.digit_images import DigitImages
from crevnet.data.motion import bouncing_pixels
from crevnet.data.resizing import resize
from crevnet.data.sequence_set import Indices, SequenceSet
from crevnet.data.uniforms import indexed_uniforms

CLASSIC_STEP = 0.1
"""Step per frame as a part of the free span (image_size - digit_size), as in Srivastava et al. (2015)."""

_DRAWS_PER_DIGIT = 5


def check_motion(
    num_digits: int, image_size: int, digit_size: int, speed: tuple[float, float] | None, section: str = ""
) -> None:
    """Check what `MovingMNIST` is to move, and how; as there.

    Args:
        num_digits: digits per sequence.
        image_size: side of a frame, pixels.
        digit_size: side of a digit, pixels.
        speed: lowest and highest speed, pixels per frame.
        section: what messages put in front of the names, such as `data.`.

    Raises:
        ValueError: an argument is out of range.
    """
    for name, value in (("num_digits", num_digits), ("digit_size", digit_size)):
        if value < 1:
            raise ValueError(f"{section}{name} must be at least 1, got {value}")
    if digit_size > image_size:
        raise ValueError(
            f"{section}digit_size {digit_size} exceeds {section}image_size {image_size}; lower {section}digit_size or "
            f"raise {section}image_size"
        )
    if speed is not None and not 0 <= speed[0] <= speed[1] < math.inf:
        raise ValueError(f"{section}speed must be finite pixels per frame with 0 <= lowest <= highest, got {speed}")


class MovingMNIST(SequenceSet):
    """Digits that move in straight lines and bounce off the borders of the frame.

    Every sequence is a pure function of (seed, stream, index): the same in any batch, worker, rank or order.
    Each digit is chosen uniformly with replacement, starts anywhere in the frame, and moves at constant speed
    in a direction uniform over the circle, reflected elastically at the borders; positions are rounded to
    whole pixels; where digits overlap the brighter pixel shows.

    Source: N. Srivastava, E. Mansimov, R. Salakhutdinov, "Unsupervised learning of video representations
    using LSTMs", ICML 2015. Their generator clips at the border where this one reflects, and truncates to
    whole pixels where this one rounds, so the two agree in kind, not pixel by pixel.

    Args:
        digits: the images to move, resized to `digit_size` where necessary.
        num_digits: digits per sequence.
        image_size: height and width of a frame, pixels.
        digit_size: height and width of a digit, pixels.
        frames: frames per sequence.
        speed: lowest and highest speed, pixels per frame, drawn uniformly between them for each digit; None
            for the classic constant 0.1 * (image_size - digit_size), 3.6 pixels for 28 in 64.
        seed: which sequences, 0 to 2**64 - 1.
        stream: keeps sets with the same seed apart, such as training and test, 0 to 2**64 - 1.
        size: number of sequences; costs no memory.

    Raises:
        ValueError: an argument is out of range, or `digits` is empty.
    """

    def __init__(
        self,
        digits: DigitImages,
        *,
        num_digits: int = 2,
        image_size: int = 64,
        digit_size: int = 28,
        frames: int = 20,
        speed: tuple[float, float] | None = None,
        seed: int = 0,
        stream: int = 0,
        size: int,
    ) -> None:
        for name, value in (("frames", frames), ("size", size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_motion(num_digits, image_size, digit_size, speed)
        if size > sys.maxsize:
            raise ValueError(f"size must be at most {sys.maxsize}, the largest len(), got {size}")
        for name, value in (("seed", seed), ("stream", stream)):
            if not 0 <= value < 2**64:
                raise ValueError(f"{name} must be 0 to 2**64 - 1, got {value}")
        if len(digits) == 0:
            raise ValueError(f"digits ({digits.name}) is empty; pass at least one image")
        self.num_digits = num_digits
        self.image_size = image_size
        self.digit_size = digit_size
        self.frames = frames
        self.speed = (CLASSIC_STEP * (image_size - digit_size),) * 2 if speed is None else speed
        self.seed = seed
        self.stream = stream
        self.size = size
        self.name = digits.name
        self._glyphs = resize(digits.images, digit_size)

    def batch(self, indices: Indices) -> Tensor:
        """As in `SequenceSet`: grey levels 0..255 divided by 255."""
        glyph_BK, row_BKT, column_BKT = self.trajectories(indices)
        B, T, H, D = len(glyph_BK), self.frames, self.image_size, self.digit_size
        canvas_BTHW = np.zeros((B, T, H, H), np.uint8)
        # Every D x D window of every frame as a writable view: one digit of all frames is one indexed store.
        windows = sliding_window_view(canvas_BTHW, (D, D), axis=(2, 3), writeable=True)
        sequence_B1, frame_T = np.arange(B)[:, None], np.arange(T)
        for k in range(self.num_digits):
            where = (sequence_B1, frame_T, row_BKT[:, k], column_BKT[:, k])
            glyphs_B1DD = self._glyphs[glyph_BK[:, k], None]
            windows[where] = np.maximum(windows[where], glyphs_B1DD)
        return torch.from_numpy(canvas_BTHW).to(torch.float32).div_(255).unsqueeze(2)

    def trajectories(self, indices: Indices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return which digits the sequences at `indices` show, and where.

        Returns:
            The index of each image, int64 [B, K], and the row and the column of its top left pixel,
            int64 [B, K, T].

        Raises:
            IndexError: see `batch`.
        """
        index_B = self.checked(indices)
        K = self.num_digits
        draws = indexed_uniforms(index_B, K * _DRAWS_PER_DIGIT, seed=self.seed, stream=self.stream)
        image, row, column, direction, pace = np.moveaxis(draws.reshape(-1, K, _DRAWS_PER_DIGIT), -1, 0)
        span = self.image_size - self.digit_size
        angle = 2 * np.pi * direction
        speed = self.speed[0] + (self.speed[1] - self.speed[0]) * pace
        row_BKT = bouncing_pixels(row * span, speed * np.sin(angle), self.frames, span)
        column_BKT = bouncing_pixels(column * span, speed * np.cos(angle), self.frames, span)
        return (image * len(self._glyphs)).astype(np.int64), row_BKT, column_BKT
