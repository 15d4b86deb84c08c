"""Training memory, measured in live tensor bytes and predicted by formula, and the FLOPs it is paid with. 1 MB is 10^6
bytes.
"""

import math
from functools import cache

import torch

from benchmarks.timing import no_collector
from benchmarks.training import Variant, random_clips, training_step
from crevnet.model import CrevNetConfig
from crevnet.video_model import VideoConfig
from revgrad import LiveMemory
from revgrad.cost import Flops

MB = 1e6
_FLOAT = 4
_RESERVOIR = 8 + 2  # bytes per element: the number and its level
_SEED = 0


@cache
def flops(cell: str, variant: Variant, steps: int) -> int:
    """Floating-point operations of a training step of the paper's configuration with one sample.

    Without oneDNN, which leaves convolutions to PyTorch: with it, some gradients take fewer operations than they have.
    """
    config = variant.of(CrevNetConfig(cell=cell))
    torch.manual_seed(_SEED)
    model, clips = config.build(), random_clips(config, 1, steps)
    with torch.backends.mkldnn.flags(enabled=False), Flops() as counter:
        training_step(model, clips)
    return counter.total


@cache
def marginal_mb(cell: str, modules: int, blocks: tuple[int, ...], variant: Variant, steps: int) -> float:
    """`marginal_mb_of` a variant of the paper's configuration."""
    config = variant.of(CrevNetConfig(cell=cell, modules=modules, blocks=blocks))
    training_peak(config, 1, steps=1)  # tables and modules that are loaded once must not count
    return marginal_mb_of(config, steps)


def marginal_mb_of(config: VideoConfig, steps: int) -> float:
    """Memory that one more sample takes: the peak of a training step with batch 2 minus that with batch 1."""
    return (training_peak(config, 2, steps) - training_peak(config, 1, steps)) / MB


def training_peak(config: VideoConfig, batch: int, steps: int) -> int:
    """Most bytes alive from the start of the forward to the end of the backward pass.

    Weights, their gradients and the frames were there before and do not count.
    """
    torch.manual_seed(_SEED)
    model, clips = config.build(), random_clips(config, batch, steps)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with no_collector(), LiveMemory() as memory:
        training_step(model, clips)
    return memory.peak


def states_mb(config: CrevNetConfig, steps: int) -> float:
    """Recurrent states per sample that are kept when the backward pass needs most of them.

    At every step a module reads its own states (h and c) and, with ST-LSTM, the memory m that is handed from module to
    module. The states before the first step are one tensor of zeros. Where only every n-th state is kept, there are the
    states at the starts of the segments of n steps before, and all those of one segment. Cells that are inverted are
    there once before a segment (before the first step one more tensor of zeros, on the grid) and once behind it.
    """
    own, carried = _states_per_step(config)
    cells = config.modules if config.cell_states == "inverted" else 0
    read = own - cells
    n = steps if config.keep_states_every == 1 else config.keep_states_every
    first = 1 + min(cells, 1) + (min(n, steps) - 1) * read + min(n, steps) * carried + cells
    kept = [first]
    for i in range(1, math.ceil(steps / n)):
        before = (i - 1) * (own + min(carried, 1))
        kept.append(1 + min(cells, 1) + before + min(n, steps - i * n) * (read + carried) + 2 * cells)
    return max(kept) * _feature_bytes(config) / MB


def state_gradients_mb(config: CrevNetConfig) -> float:
    """Gradients of the states that one time step hands to the next, per sample."""
    own, carried = _states_per_step(config)
    return (own + min(carried, 1)) * _feature_bytes(config) / MB


def predictions_mb(config: CrevNetConfig, steps: int) -> float:
    """The predicted clips and their gradients, per sample."""
    return 2 * steps * config.channels * config.clip * math.prod(config.frame_size) * _FLOAT / MB


def residue_mb(config: CrevNetConfig, steps: int) -> float:
    """What exact arithmetic keeps per sample, of the forward pass that is measured; 0 in float arithmetic."""
    if config.arithmetic == "float":
        return 0.0
    torch.manual_seed(_SEED)
    model, clips = config.build(), random_clips(config, 1, steps)
    state = None
    for t in range(steps):
        _, state = model.step(clips[:, t], state)
    kept = state.residue.bits / 8
    n = config.keep_states_every
    if n > 1:
        reservoirs = _RESERVOIR * _feature_bytes(config) // _FLOAT
        kept = math.ceil(steps / n) * reservoirs + (kept - reservoirs) * n / steps
    return kept / MB


def _states_per_step(config: CrevNetConfig) -> tuple[int, int]:
    """Tensors that the modules read at a time step: their own, and those handed from one to the next."""
    return 2 * config.modules, config.modules if config.cell == "stlstm" else 0


def _feature_bytes(config: CrevNetConfig) -> int:
    """Size of one of the predictor's two streams, and of a state, per sample: the two are the clip, rearranged."""
    return config.channels * config.clip * math.prod(config.frame_size) // 2 * _FLOAT
