"""Frames to the model's inputs: short overlapping clips (section 2.3).

Shape letters: B batch, T frames, N clips, C channels, K frames per clip, H height, W width.
"""

from typing import Literal

from einops import rearrange
from torch import Tensor

Stacking = Literal["depth", "channels"]


def frames_to_clips(frames_BTCHW: Tensor, length: int, stacking: Stacking) -> Tensor:
    """All clips of consecutive frames: clip t holds the frames t .. t + length - 1.

    Args:
        frames_BTCHW: Frames.
        length: K.
        stacking: `depth` makes time a dimension, `[B, N, C, K, H, W]` (a view: no memory); `channels` puts the frames
            side by side as channels, `[B, N, K C, H, W]`.

    Raises:
        ValueError: Fewer frames than a clip has.
    """
    if frames_BTCHW.ndim != 5:
        raise ValueError(
            f"frames must be [batch, time, channels, height, width], got shape {tuple(frames_BTCHW.shape)}"
        )
    if frames_BTCHW.shape[1] < length:
        raise ValueError(f"a clip has {length} frames, but only {frames_BTCHW.shape[1]} were given")
    clips_BNCHWK = frames_BTCHW.unfold(1, length, 1)
    if stacking == "depth":
        return rearrange(clips_BNCHWK, "b n c h w k -> b n c k h w")
    return rearrange(clips_BNCHWK, "b n c h w k -> b n (k c) h w")


def newest_frames(clips: Tensor, channels: int, stacking: Stacking) -> Tensor:
    """The last frame of every clip, `[B, N, C, H, W]`: of a predicted clip, the frame that none before it held."""
    return clips[:, :, :, -1] if stacking == "depth" else clips[:, :, -channels:]
