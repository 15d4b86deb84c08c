"""What every model here is: it reads clips, one per time step, and predicts the clip that follows.

Shape letters: B batch, T frames, N clips, C channels, K frames per clip, H height, W width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from crevnet.clips import Stacking, frames_to_clips, newest_frames
from crevnet.frame_size import FrameSize, height_width


@dataclass(kw_only=True)
class VideoConfig:
    """What the configurations of all models have in common; each names its model and builds it."""

    name: str = ""
    """Which model this is."""
    channels: int = 1
    """Channels of a frame."""
    image_size: FrameSize = 64
    """Height and width of a frame in pixels, such as `[128, 160]`; one number where they are equal."""
    clip: int = 1
    """Frames per time step."""
    stacking: Stacking = "channels"
    """`depth`: time is a dimension of a clip, convolutions are 3D; `channels`: the frames of a clip are channels,
    convolutions are 2D.
    """

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"model.{name} must be one of {list(get_args(kind))}, got {value!r}")
            if kind is int and value < 1:
                raise ValueError(f"model.{name} must be at least 1, got {value}")
        if min(self.frame_size) < 1:
            raise ValueError(f"model.image_size must be at least 1, got {self.image_size}")

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of a frame in pixels."""
        return height_width(self.image_size)

    def clip_shape(self) -> tuple[int, ...]:
        """Shape of one clip: `(C, K, H, W)` or, stacked in channels, `(K C, H, W)`."""
        depth = self.stacking == "depth"
        return (self.channels, self.clip, *self.frame_size) if depth else (self.channels * self.clip, *self.frame_size)

    def ways(self, steps: int, begun: str | None = None) -> Mapping[str, "VideoConfig"]:
        """Ways to train the same weights, by name, the fastest first; of more than one the trainer chooses.

        Args:
            steps: Time steps of a training sequence.
            begun: The way in which a run that is resumed has been trained so far.
        """
        return {"stored": self}

    def build(self) -> "VideoModel":
        """The model, with random weights."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to build its model")


class VideoModel(nn.Module):
    """A model that predicts, at every time step, the clip after the one it reads.

    Args:
        config: What the model was made from.
    """

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, clips: Tensor, fed: Sequence[bool] | None = None, steps: int | None = None) -> Tensor:
        """Predict the following clip at every time step.

        Args:
            clips: `[B, N, C, K, H, W]` (`[B, N, K C, H, W]` for clips stacked in channels), values in 0 .. 1.
            fed: Per time step, whether the model is given the true clip (teacher forcing) or goes on from what it
                predicted (free running); by default the N given clips, then its own.
            steps: Number of time steps; by default N.

        Returns:
            Predictions like the clips, `[B, steps, ...]`: prediction t is of clip t + 1.

        Raises:
            ValueError: Shapes that do not fit the model, more clips wanted than given, nothing fed at the first step.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def loss(self, clips: Tensor, fed: Sequence[bool] | None = None) -> Tensor:
        """Mean squared error of all predictions, a scalar.

        Args:
            clips: N + 1 clips; the first N are read, the last N predicted.
            fed: As in `forward`, for N time steps.
        """
        # PyTorch's CPU loss keeps storage as large as its input alive behind the scalar; a copy lets it go.
        return mse_loss(self(clips[:, :-1], fed=fed), clips[:, 1:]).clone()

    @torch.no_grad()
    def predict(self, frames: Tensor, steps: int) -> Tensor:
        """Predict the frames that follow.

        Args:
            frames: Observed frames `[B, T, C, H, W]`, values in 0 .. 1; at least one clip.
            steps: Number of frames to predict.

        Returns:
            `[B, steps, C, H, W]`.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        clips = frames_to_clips(frames, self.config.clip, self.config.stacking)
        return newest_frames(self.predict_clips(clips, steps), self.config.channels, self.config.stacking)

    def predict_clips(self, clips: Tensor, steps: int) -> Tensor:
        """Predict the clips that follow, `[B, steps, ...]`, the first of them one frame after the last one given.

        Args:
            clips: As in `forward`.
            steps: Number of clips to predict.
        """
        observed = clips.shape[1]
        return self(clips, steps=observed + steps - 1)[:, observed - 1 :]

    def feeding(self, clips: Tensor, fed: Sequence[bool] | None, steps: int | None) -> list[bool]:
        """Check the arguments of `forward` and complete them: per time step, whether a clip is given."""
        self.check_clip(clips[:, 0] if clips.ndim > 1 and clips.shape[1] else clips)
        given = clips.shape[1]
        steps = given if steps is None else steps
        fed = [t < given for t in range(steps)] if fed is None else list(fed)
        if len(fed) != steps or any(f and t >= given for t, f in enumerate(fed)) or not fed or not fed[0]:
            raise ValueError(
                f"fed must say for each of {steps} steps whether one of the {given} clips is given, the first one "
                f"always"
            )
        return fed

    def check_clip(self, clip: Tensor) -> None:
        """Raise unless a batch of clips is of the shape that the model is built for.

        Raises:
            ValueError: It is not.
        """
        expected = self.config.clip_shape()
        if clip.shape[1:] != expected:
            raise ValueError(
                f"{type(self).__name__}: clips of shape {tuple(clip.shape[1:])} given, but the model is built for "
                f"{expected}"
            )


class RecurrentModel(VideoModel):
    """A model that is one function of the current clip and a state, and that reads its own prediction when none is fed.

    Subclasses define `initial_state` and `step`.
    """

    def initial_state(self, like: Tensor) -> Any:
        """The state before the first time step.

        Args:
            like: A batch of clips: for its batch size, dtype and device.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define initial_state")

    def step(self, clip: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One time step: the predicted clip and the new state; what it was given stays as it is.

        Args:
            clip: `[B, *clip_shape]`.
            state: What `initial_state` or the step before returned.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define step")

    def forward(self, clips: Tensor, fed: Sequence[bool] | None = None, steps: int | None = None) -> Tensor:
        """As in `VideoModel`."""
        plan = self.feeding(clips, fed, steps)
        predictions: list[Tensor] = []
        state = self.initial_state(clips[:, 0])
        for t, given in enumerate(plan):
            prediction, state = self.step(clips[:, t] if given else predictions[-1], state)
            predictions.append(prediction)
        return torch.stack(predictions, dim=1)
