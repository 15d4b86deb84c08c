"""Configuration of a training run: one dataclass per concern, nested in `TrainConfig`, checked when made."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from crevnet.data import DataConfig, MovingMNISTConfig, VideosConfig
from crevnet.frame_size import height_width, in_words
from crevnet.metrics import SSIM_WINDOW
from crevnet.model import CrevNetConfig
from crevnet.video_model import VideoConfig
from revgrad import StreamError
from revgrad.budget import parse_bytes


def _check_choice(section: str, config: Any, name: str) -> None:
    value, choices = getattr(config, name), get_args(get_type_hints(type(config))[name])
    if value not in choices:
        raise ValueError(f"{section}.{name} must be one of {list(choices)}, got {value!r}")


@dataclass(kw_only=True)
class OptimiserConfig:
    """Adam and its learning rate. The paper (section 3.1) names what it starts with; what becomes of it (`drop_every`,
    `drop_factor`, with `schedule: step`) is from the authors' code.
    """

    learning_rate: float = 5e-4
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moments."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """`cosine` lets the learning rate fall to zero at the last step; such a run cannot be made longer. `step`
    multiplies it by `drop_factor` after every `drop_every` steps.
    """
    drop_every: int = 250_000
    """Steps between two drops, counted from the first step of the run, `step` only."""
    drop_factor: float = 0.2
    """What is left of the learning rate at a drop, `step` only."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"optimiser.learning_rate must be positive, got {self.learning_rate}")
        if self.warmup_steps < 0 or self.clip_norm < 0:
            raise ValueError("optimiser.warmup_steps and optimiser.clip_norm must not be negative")
        if self.drop_every < 1:
            raise ValueError(f"optimiser.drop_every must be at least 1, got {self.drop_every}")
        if not 0 < self.drop_factor < 1:
            raise ValueError(f"optimiser.drop_factor must be between 0 and 1, got {self.drop_factor}")
        _check_choice("optimiser", self, "schedule")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "step":
            return self.learning_rate * self.drop_factor ** (step // self.drop_every)
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(kw_only=True)
class FeedingConfig:
    """What the model is given after the observed frames while it trains: the truth, or its own features."""

    kind: Literal["teacher", "free", "scheduled"] = "teacher"
    """`teacher`: the true clip at every time step (as the paper trains); `free`: none after the observed frames;
    `scheduled`: the true clip with a probability that falls from 1 to 0."""
    fall_from: int = 0
    """Step at which the probability starts to fall, `scheduled` only."""
    fall_to: int = 0
    """Step at which it has reached 0, `scheduled` only."""

    def __post_init__(self) -> None:
        _check_choice("feeding", self, "kind")
        if self.kind == "scheduled" and not 0 <= self.fall_from < self.fall_to:
            raise ValueError(
                f"feeding: scheduled needs 0 <= fall_from < fall_to, got fall_from={self.fall_from}, "
                f"fall_to={self.fall_to}"
            )

    def truth_probability(self, step: int) -> float:
        """How likely a clip after the observed ones is given."""
        if self.kind != "scheduled":
            return 1.0 if self.kind == "teacher" else 0.0
        return 1.0 - min(1.0, max(0.0, (step - self.fall_from) / (self.fall_to - self.fall_from)))


@dataclass(kw_only=True)
class RunConfig:
    """Where a run is kept, and how often it looks up."""

    folder: Path | None = None
    """Folder of the run; a run that was interrupted there goes on. None makes a new one under `runs/`."""
    init: Path | None = None
    """Weights to begin with, those of another run: its folder, for the best ones by validation, or that of one of its
    checkpoints. Read once, when the first step is taken. None begins with random ones.
    """
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints to keep, besides the best one."""
    validate_every: int = 1000
    """Steps between validations."""
    validation_sequences: int = 256
    """Sequences to validate on; made of training digits that are held out."""
    log_every: int = 10
    """Steps between entries in the logs."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`. Which of several CUDA devices, `CUDA_VISIBLE_DEVICES` says."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """`bf16-mixed` runs convolutions in bfloat16; streams stay in float32."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: `ddp` has all weights on each, `fsdp` shards weights, gradients and Adam's moments."""
    memory: int | str = "auto"
    """Memory that training may take, per process: bytes or a text such as `4 GiB`; `auto` is what is free. With
    `model.mode=auto` the fastest way to train that fits is taken.
    """
    cuda_graph: bool = False
    """On one CUDA device, replay every training step from a CUDA graph, optimiser included: the host no longer launches
    its thousands of operators one by one. The first step takes longer.
    """
    workers: int = 0
    """Processes that make training sequences; 0 makes them in this one, which is fast enough except beside a fast GPU.
    """
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep", "validate_every", "validation_sequences", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} must be at least 1, got {getattr(self, name)}")
        if self.workers < 0 or self.threads < 0:
            raise ValueError("run.workers and run.threads must not be negative")
        _check_choice("run", self, "precision")
        _check_choice("run", self, "strategy")
        try:
            _ = self.memory_bytes
        except StreamError:
            raise ValueError(
                f"run.memory must be 'auto', bytes or a text such as '4 GiB' or '500 MB', got {self.memory!r}"
            ) from None

    @property
    def memory_bytes(self) -> int | None:
        """What `memory` says; None for `auto`."""
        return None if self.memory == "auto" else parse_bytes(self.memory)


@dataclass(kw_only=True)
class TrainConfig:
    """A training run. The defaults are the paper's Moving MNIST setting, at a constant learning rate."""

    model: VideoConfig = field(default_factory=CrevNetConfig)
    """The network: the configuration of one of `crevnet.models.MODELS`."""
    data: DataConfig = field(default_factory=MovingMNISTConfig)
    """The sequences: the configuration of one of `crevnet.datasets.DATASETS`."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """Adam and its learning rate."""
    feeding: FeedingConfig = field(default_factory=FeedingConfig)
    """Teacher forcing or free running."""
    run: RunConfig = field(default_factory=RunConfig)
    """Folder, checkpoints, logs, device."""
    observed: int = 10
    """Frames given."""
    steps: int = 300_000
    """Optimiser steps."""
    batch_size: int = 16
    """Sequences per step, over all processes."""
    seed: int = 0
    """Seed of the weights and of scheduled feeding."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1:
            raise ValueError(
                f"steps must not be negative and batch_size at least 1, got {self.steps} and {self.batch_size}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be 0 to 2**32 - 1, got {self.seed}")
        if height_width(self.data.image_size) != self.model.frame_size:
            raise ValueError(
                f"data.image_size {in_words(self.data.image_size)} and model.image_size "
                f"{in_words(self.model.image_size)} differ; set both"
            )
        if self.data.frame_channels() != self.model.channels:
            raise ValueError(
                f"model.channels is {self.model.channels}, but the frames of {self.data.source()} have "
                f"{self.data.frame_channels()}"
            )
        if isinstance(self.data, VideosConfig):
            self.data.check_run_folder(self.run.folder)
        if min(self.model.frame_size) < SSIM_WINDOW:
            raise ValueError(
                f"model.image_size must be at least {SSIM_WINDOW}, the window of SSIM, got "
                f"{in_words(self.model.image_size)}"
            )
        if not self.model.clip <= self.observed < self.data.frames:
            raise ValueError(
                f"observed must be at least model.clip ({self.model.clip}) and below data.frames "
                f"({self.data.frames}), got {self.observed}"
            )

    @property
    def predicted(self) -> int:
        """Frames to predict."""
        return self.data.frames - self.observed
