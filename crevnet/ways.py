"""Memory against speed: of the ways to train a model, the fastest that fits into memory."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from crevnet.clips import frames_to_clips
from crevnet.convolution import use_channels_last
from crevnet.video_model import VideoConfig, VideoModel
from revgrad import LiveMemory

MARGIN = 0.9
"""Part of the free memory that is counted on. The rest is for what is not seen in tensors: scratch memory of operators,
gaps between blocks; and for a residue that grows as gates learn to close.
"""


class NoWayFits(ValueError):  # noqa: N818
    """No way to train fits into memory; the message names the one that needs least."""


@dataclass(frozen=True)
class Choice:
    """The way that is taken; as text, one line with the numbers."""

    name: str
    config: VideoConfig
    available: float
    """Bytes."""
    needs: Mapping[str, float]
    """Bytes by name of the ways that were measured: those that do not fit, then the one that is taken."""

    def __str__(self) -> str:
        *others, (_, need) = self.needs.items()
        line = f"Training {self.name}: needs {mebibytes(need)} of {mebibytes(self.available)}"
        return line + "".join(f"; {name} would need {mebibytes(more)}" for name, more in others)


def choose(ways: Mapping[str, VideoConfig], available: float, need: Callable[[VideoConfig], float]) -> Choice:
    """The first way that fits; those after it are not measured.

    Args:
        ways: Configurations by name, the fastest first.
        available: Bytes.
        need: Measures the bytes that a way takes.

    Raises:
        NoWayFits: None does.
    """
    needs: dict[str, float] = {}
    for name, config in ways.items():
        needs[name] = need(config)
        if needs[name] <= available:
            return Choice(name, config, available, needs)
    least = min(needs, key=lambda name: needs[name])
    raise NoWayFits(
        f"no way to train fits into {mebibytes(available)}: the least is {mebibytes(needs[least])}, {least}; lower "
        "batch_size or raise run.memory"
    )


def training_bytes(
    config: VideoConfig,
    batch: int,
    frames: int,
    device: torch.device,
    *,
    gradients: int = 1,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> float:
    """Bytes that training takes at its peak: weights, gradients, Adam's moments, and a step's activations.

    Measured on another model with random weights, so that nothing of a run is touched: the forward and backward pass
    of one sequence and of two. A batch takes so much more as it has more sequences.

    Args:
        config: The model.
        batch: Sequences.
        frames: Frames per sequence, those that are predicted too.
        device: Where to measure.
        gradients: How many tensors there are per gradient; two where DDP has its buckets.
        autocast: What the forward pass runs under.

    Returns:
        Infinity if not even two sequences fit on the device.
    """
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        model = config.build().to(device)
        use_channels_last(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        try:
            # The first time step of each size makes tables that stay, and on a GPU tunes the kernels.
            for length in (config.clip + 1, frames):
                peaks = [_peak(model, n, length, device, autocast) for n in (1, 2)[:batch]]
        except torch.OutOfMemoryError:
            return math.inf
        finally:
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
    activations = peaks[0] + (batch - 1) * (peaks[-1] - peaks[0])
    weights = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    moments = 2 * weights
    return weights + buffers + gradients * weights + moments + activations


def _peak(
    model: VideoModel, batch: int, frames: int, device: torch.device, autocast: Callable[[], AbstractContextManager]
) -> int:
    """Most bytes alive in a training step besides weights and their gradients. All true clips are fed."""
    config = model.config
    size = (batch, frames, config.channels, *config.frame_size)
    with _MemoryOf(device) as memory:
        clips = frames_to_clips(torch.rand(size, device=device), config.clip, config.stacking)
        with autocast():
            loss = model.loss(clips)
        loss.backward()
    return memory.peak


class _MemoryOf(LiveMemory):
    """Counts what is on one kind of device: with `model.offload` states wait in host memory, which is not short."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._kind = device.type

    def _count(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        if storage.device.type == self._kind:
            super()._count(storage, before)


def mebibytes(size: float) -> str:
    """Bytes for people to read."""
    return f"{size / 2**20:,.1f} MiB" if math.isfinite(size) else "more than there is"
