"""One training step: loss, backward pass, clipping and Adam, one by one or replayed from a CUDA graph."""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from crevnet.clips import frames_to_clips
from crevnet.config import TrainConfig
from crevnet.cuda_graph import GraphedStep
from crevnet.sharding import views_are_fine, whole
from crevnet.video_model import VideoModel
from revgrad import LiveMemory, ReversibilityError


class TrainingDiverged(RuntimeError):  # noqa: N818
    """A loss or gradient is not finite; nothing of that step was kept."""


class _Allocated(AbstractContextManager["_Allocated"]):
    """As `LiveMemory`, what the allocator of a CUDA device gives out, to operators as well."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak = 0

    def __enter__(self) -> "_Allocated":
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *error: object) -> None:
        self.peak = torch.cuda.max_memory_allocated(self._device) - self._before


class TrainingStep:
    """Takes the steps of a run.

    Args:
        config: The run.
        fabric: Launched.
        model: As Fabric has set it up.
        raw_model: The model itself.
        optimiser: Adam, as Fabric has set it up.
    """

    def __init__(self, config: TrainConfig, fabric: Fabric, model: Any, raw_model: VideoModel, optimiser: Any) -> None:
        self.config = config
        self.fabric = fabric
        self.model = model
        self.raw_model = raw_model
        self.optimiser = optimiser
        self.peak_activation_bytes = 0
        """Most bytes of activations alive in a step, once one has been measured."""
        self._measured_before = 2
        self._graphed: GraphedStep | None = None
        self._step = 0

    def __call__(self, frames: Tensor, step: int) -> tuple[float, float]:
        """Take a step; returns the loss and the norm of the gradient.

        Args:
            frames: `[B, T, C, H, W]`.
            step: How many have been taken before.

        Raises:
            TrainingDiverged: Something is not finite, or the engine cannot go on; weights are as before.
        """
        config, self._step = self.config, step
        rate = config.optimiser.rate(step, config.steps)
        clips = frames_to_clips(frames, config.model.clip, config.model.stacking)
        take = self._replayed if config.run.cuda_graph else self._called
        try:
            loss, norm = take(clips, rate)
        except ReversibilityError as error:
            raise TrainingDiverged(f"step {step + 1}: {error}") from error
        return loss, norm

    def measure_anew(self, step: int) -> None:
        """Measure the peak in the next two steps: it may have been that of another way to train, or of another device.

        Args:
            step: How many have been taken before.
        """
        self.peak_activation_bytes = 0
        self._measured_before = step + 2

    def _called(self, clips: Tensor, rate: float) -> tuple[float, float]:
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        # The second step, unless there is only one: the first also makes tables that stay, and on a GPU tunes kernels,
        # for which Triton takes memory.
        if self._step < self._measured_before:
            # Gradients are made beforehand: what is measured is activations.
            for p in self.raw_model.parameters():
                p.grad = torch.zeros_like(p)
            with _Allocated(clips.device) if clips.device.type == "cuda" else LiveMemory() as measure:
                loss = self._backward(clips)
            self.peak_activation_bytes = measure.peak
        else:
            loss = self._backward(clips)
        self._check_loss(loss)
        parameters = list(self.raw_model.parameters())
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(whole(total))
        self._check_norm(norm)  # before clipping, which would spread a NaN to all
        if self.config.optimiser.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optimiser.clip_norm, total)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss, norm

    def _replayed(self, clips: Tensor, rate: float) -> tuple[float, float]:
        if self._graphed is None:
            self._graphed = GraphedStep(
                self._loss,
                self.raw_model,
                self.optimiser.optimizer,
                backward=self.fabric.backward,
                clip_norm=self.config.optimiser.clip_norm,
            )
        loss, norm = self._graphed(clips, rate)
        if clips.device.type == "cuda" and not self.peak_activation_bytes:
            # The capture's. What is there when it is over (weights, their gradients, moments) is no activation.
            most, stays = torch.cuda.max_memory_allocated(clips.device), torch.cuda.memory_allocated(clips.device)
            self.peak_activation_bytes = most - stays
        self._check_loss(loss)
        self._check_norm(norm)
        return loss, norm

    def _loss(self, clips: Tensor) -> Tensor:
        fed = feeding_plan(self.config, clips.shape[1] - 1, self._step)
        # Fabric enters autocast by itself around `forward` only.
        with self.fabric.autocast(), views_are_fine(self.raw_model):
            return self.model.loss(clips, fed)

    def _backward(self, clips: Tensor) -> float:
        loss = self._loss(clips)
        self.fabric.backward(loss)
        return float(self.fabric.all_reduce(loss.detach(), reduce_op="mean"))  # type: ignore[arg-type]

    def _check_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"step {self._step + 1}: the loss is {loss}; the last checkpoint is untouched. Lower "
                f"optimiser.learning_rate"
            )

    def _check_norm(self, norm: float) -> None:
        if not math.isfinite(norm):
            names = [
                n
                for n, p in self.raw_model.named_parameters()
                if p.grad is not None and not bool(whole(p.grad).isfinite().all())
            ]
            raise TrainingDiverged(
                f"step {self._step + 1}: the gradient is not finite, first in {names[0] if names else 'its norm'} "
                f"({len(names)} parameters); "
                "the last checkpoint is untouched. Lower optimiser.learning_rate or set optimiser.clip_norm"
            )


def feeding_plan(config: TrainConfig, steps: int, step: int) -> list[bool]:
    """Per time step, whether the true clip is given: always while observing, afterwards as configured.

    A pure function of configuration and step, the same on every process and after a resumption.
    """
    observed = config.observed - config.model.clip + 1
    probability = config.feeding.truth_probability(step)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    draws = torch.rand(steps, generator=generator).tolist()
    return [t < observed or draw < probability for t, draw in enumerate(draws)]
