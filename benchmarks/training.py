"""The training step that is measured: the paper's CrevNet on Moving MNIST, in different modes."""

from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from crevnet.clips import frames_to_clips
from crevnet.model import CrevNetConfig
from crevnet.video_model import VideoConfig, VideoModel

CELLS = ("stlstm", "convlstm")
STEPS = 19
"""Time steps of a training step, the same for all systems of table 1. To a model of single frames they are 10 -> 10
frames; to CrevNet 22 frames in clips of three, where training on 20 frames takes 17 steps.
"""


@dataclass(frozen=True)
class Variant:
    """A way to train the same weights."""

    mode: Literal["reversible", "checkpoint", "stored"]
    arithmetic: Literal["exact", "float"] = "exact"
    keep_states_every: int = 1
    offload: bool = False
    cell_states: Literal["kept", "inverted"] = "kept"
    clips_at_once: int = 1

    def __str__(self) -> str:
        every = f", states every {self.keep_states_every} steps" if self.keep_states_every > 1 else ""
        inverted = ", cells inverted" if self.cell_states == "inverted" else ""
        together = f", {self.clips_at_once} clips at once" if self.clips_at_once > 1 else ""
        return f"{self.mode} {self.arithmetic}{inverted}{every}{together}{', offload' if self.offload else ''}"

    def of(self, config: CrevNetConfig) -> CrevNetConfig:
        """The configuration with this variant's settings."""
        return replace(config, **asdict(self))


def random_clips(config: VideoConfig, batch: int, steps: int) -> Tensor:
    """Clips for so many time steps and their targets, `[batch, steps + 1, C, K, H, W]`."""
    frames = torch.rand(batch, steps + config.clip, config.channels, *config.frame_size)
    return frames_to_clips(frames, config.clip, config.stacking)


def training_step(model: VideoModel, clips: Tensor) -> None:
    """Forward pass with teacher forcing, mean squared error, backward pass. No optimiser."""
    model.loss(clips).backward()
