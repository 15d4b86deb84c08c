"""Sequences cut from videos.

Shapes: B sequences, T frames, C channels, H x W pixels.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from crevnet.data.errors import DataError
from crevnet.data.sequence_set import Indices, SequenceSet
from crevnet.data.uniforms import indexed_uniforms

FEW = 10
"""With fewer videos than this, the end of each is held out; otherwise whole ones."""


class Video:
    """A video, decoded when its frames are first asked for.

    Args:
        name: what messages call it.
        frames: the attribute of this name, or a function that returns it.
    """

    def __init__(self, name: str, frames: np.ndarray | Callable[[], np.ndarray]) -> None:
        self.name = name
        self._given = frames

    @cached_property
    def frames(self) -> np.ndarray:
        """[frames, C, H, W], uint8 or float32 in 0 .. 1, in memory or mapped to it."""
        return self._given if isinstance(self._given, np.ndarray) else self._given()


class VideoWindows(SequenceSet):
    """Windows of consecutive frames from videos: drawn at random with replacement, all equally likely, or in order.

    Every sequence is a pure function of its index (and the seed): the same in any batch, worker, rank or order.

    Args:
        videos: the videos. Those that are shorter than a window give none, which a RuntimeWarning tells.
        frames: T.
        name: whose videos, for messages.
        size: number of sequences. In order they are spread evenly over all windows, and there are at most as many.
        stride: frames from the start of one window to that of the next in a video; with `frames` none overlap.
        seed: which random windows, 0 to 2**64 - 1; None for windows in order.
        mirror: whether half of the random windows, by chance, are mirrored left to right.
        advice: what to do where no video is long enough.

    Raises:
        DataError: no video is long enough.
        ValueError: `frames` or `size` is below 1.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        frames: int,
        name: str,
        *,
        size: int,
        stride: int = 1,
        seed: int | None = None,
        mirror: bool = False,
        advice: str = "lower data.frames",
    ) -> None:
        for option, value in (("frames", frames), ("size", size)):
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        shown = tqdm(videos, desc=f"read {name}", leave=False, delay=1, file=sys.stderr)
        lengths = [len(video.frames) for video in shown]
        windows = np.array([max(0, (length - frames) // stride + 1) for length in lengths], np.int64)
        self.videos = list(videos)
        self.frames = frames
        self.stride = stride
        self.windows = int(windows.sum())
        if self.windows == 0:
            raise DataError(
                f"{name}: no video has the {frames} frames of a sequence, the longest has {max(lengths, default=0)}; "
                f"{advice}"
            )
        short = [video.name for video, n in zip(videos, windows, strict=True) if n == 0]
        if short:
            warnings.warn(
                f"{name}: {len(short)} of {len(videos)} videos have fewer than the {frames} frames of a sequence and "
                f"are not used, such as {short[0]}",
                RuntimeWarning,
                stacklevel=2,
            )
        self.size = size if seed is not None else min(size, self.windows)
        self.seed = seed
        self.mirror = mirror
        self._ends = windows.cumsum()
        self._starts = self._ends - windows

    def batch(self, indices: Indices) -> Tensor:
        """As in `SequenceSet`."""
        index_B = self.checked(indices)
        if self.seed is None:
            window_B = index_B * self.windows // self.size
            mirrored_B = np.zeros(len(index_B), bool)
        else:
            draws = indexed_uniforms(index_B, 2, seed=self.seed, stream=0)
            window_B = (draws[:, 0] * self.windows).astype(np.int64)
            mirrored_B = self.mirror & (draws[:, 1] < 0.5)
        cut = [self._cut(*each) for each in zip(window_B, mirrored_B, strict=True)]
        return torch.stack(cut) if cut else torch.empty(0, self.frames, *self.videos[0].frames.shape[1:])

    def _cut(self, window: int, mirrored: bool) -> Tensor:
        which = int(self._ends.searchsorted(window, side="right"))
        start = self.stride * (window - self._starts[which])
        cut = self.videos[which].frames[start : start + self.frames]
        return to_tensor(cut[..., ::-1] if mirrored else cut)


def to_tensor(frames: np.ndarray) -> Tensor:
    """Frames as `load_video` returns them, as float32 in [0, 1] in memory of their own."""
    copied = torch.from_numpy(np.array(frames))
    return copied.to(torch.float32).div_(255) if copied.dtype == torch.uint8 else copied


def hold_out_videos(videos: Sequence[Video], fraction: float, frames: int) -> tuple[list[Video], list[Video]]:
    """Split videos into those to keep and those to hold out, which share no frame.

    The last ones are held out, and none is decoded for that; where there are fewer than ten, of each its last frames,
    of one that is long enough for a sequence on both sides.

    Args:
        videos: the videos, in order.
        fraction: the part to hold out, between 0 and 1.
        frames: frames of a sequence.
    """
    if len(videos) >= FEW:
        cut = len(videos) - max(1, round(len(videos) * fraction))
        return list(videos[:cut]), list(videos[cut:])
    kept, held = [], []
    for video in videos:
        length = len(video.frames)
        tail = max(frames, round(length * fraction))
        cut = length - tail if length >= frames + tail else length
        kept.append(Video(video.name, video.frames[:cut]))
        if cut < length:
            held.append(Video(f"{video.name}, end", video.frames[cut:]))
    return kept, held
