"""Sequences cut from videos.

Shapes: B sequences, T frames, C channels, H x W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crevnet.data.errors import DataError
from crevnet.data.sequence_set import Indices, SequenceSet
from crevnet.data.uniforms import indexed_uniforms

FEW = 10
"""With fewer videos than this, the end of each is held out; otherwise whole ones."""


class Video(NamedTuple):
    """A video in memory, or mapped to it."""

    name: str
    frames: np.ndarray
    """[frames, C, H, W], uint8 or float32 in 0 .. 1."""


class VideoWindows(SequenceSet):
    """Windows of consecutive frames from videos: drawn at random with replacement, all equally likely, or in order.

    Every sequence is a pure function of its index (and the seed): the same in any batch, worker, rank or order.

    Args:
        videos: the videos; those that are shorter than a window give none.
        frames: T.
        name: whose videos, for messages.
        size: number of sequences. In order they are spread evenly over all windows, and there are at most as many.
        seed: which random windows, 0 to 2**64 - 1; None for windows in order.

    Raises:
        DataError: no video is long enough.
    """

    def __init__(self, videos: Sequence[Video], frames: int, name: str, *, size: int, seed: int | None = None) -> None:
        windows = np.array([max(0, len(video.frames) - frames + 1) for video in videos], np.int64)
        self.videos = list(videos)
        self.frames = frames
        self.windows = int(windows.sum())
        if self.windows == 0:
            longest = max((len(video.frames) for video in videos), default=0)
            raise DataError(
                f"{name}: no video has the {frames} frames of a sequence, the longest has {longest}; lower data.frames"
            )
        self.size = size if seed is not None else min(size, self.windows)
        self.seed = seed
        self._ends = windows.cumsum()

    def batch(self, indices: Indices) -> Tensor:
        """As in `SequenceSet`."""
        index_B = self.checked(indices)
        if self.seed is None:
            window_B = index_B * self.windows // self.size
        else:
            draws = indexed_uniforms(index_B, 1, seed=self.seed, stream=0)
            window_B = (draws[:, 0] * self.windows).astype(np.int64)
        cut = [self._cut(window) for window in window_B]
        return torch.stack(cut) if cut else torch.empty(0, self.frames, *self.videos[0].frames.shape[1:])

    def _cut(self, window: int) -> Tensor:
        which = int(self._ends.searchsorted(window, side="right"))
        frames = self.videos[which].frames
        start = window - (self._ends[which] - max(0, len(frames) - self.frames + 1))
        return to_tensor(frames[start : start + self.frames])


def to_tensor(frames: np.ndarray) -> Tensor:
    """Frames as `load_video` returns them, as float32 in [0, 1] in memory of their own."""
    copied = torch.from_numpy(np.array(frames))
    return copied.to(torch.float32).div_(255) if copied.dtype == torch.uint8 else copied


def hold_out_videos(videos: Sequence[Video], fraction: float, frames: int) -> tuple[list[Video], list[Video]]:
    """Split videos into those to keep and those to hold out, which share no frame.

    The last ones are held out; where there are fewer than ten, of each its last frames, of one that is long enough for
    a sequence on both sides.

    Args:
        videos: the videos, in order.
        fraction: the part to hold out, between 0 and 1.
        frames: frames of a sequence.
    """
    if len(videos) >= FEW:
        cut = len(videos) - max(1, round(len(videos) * fraction))
        return list(videos[:cut]), list(videos[cut:])
    kept, held = [], []
    for name, video in videos:
        tail = max(frames, round(len(video) * fraction))
        cut = len(video) - tail if len(video) >= frames + tail else len(video)
        kept.append(Video(name, video[:cut]))
        held.append(Video(f"{name}, end", video[cut:]))
    return kept, [video for video in held if len(video.frames)]
