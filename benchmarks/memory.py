"""Training memory: measured in live tensor bytes, and predicted by formula. 1 MB is 10^6 bytes."""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from benchmarks.training import Variant, random_clips, training_step
from crevnet.model import ModelConfig
from revgrad import LiveMemory

MB = 1e6
_FLOAT = 4
_RESERVOIR = 8 + 2  # bytes per element: the number and its level
_SEED = 0


@cache
def marginal_mb(cell: str, modules: int, blocks: tuple[int, ...], variant: Variant, steps: int) -> float:
    """Memory that one more sample takes: the peak of a training step with batch 2 minus that with batch 1."""
    config = variant.of(ModelConfig(cell=cell, modules=modules, blocks=blocks))
    training_peak(config, 1, steps=1)  # tables and modules that are loaded once must not count
    return (training_peak(config, 2, steps) - training_peak(config, 1, steps)) / MB


def training_peak(config: ModelConfig, batch: int, steps: int) -> int:
    """Most bytes alive from the start of the forward to the end of the backward pass.

    Weights, their gradients and the frames were there before and do not count.
    """
    torch.manual_seed(_SEED)
    model, clips = config.build(), random_clips(config, batch, steps)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with _no_collector(), LiveMemory() as memory:
        training_step(model, clips)
    return memory.peak


def states_mb(config: ModelConfig, steps: int) -> float:
    """Recurrent states per sample that are alive when the backward pass needs most of them.

    Every module reads its own states (h and c) and, with ST-LSTM, the memory m that is handed from module to
    module. Where only every n-th state is kept, these are the states at the starts of segments of n steps and
    all those of the current segment.
    """
    own, carried = 2, 1 if config.cell == "stlstm" else 0
    n = config.keep_states_every
    per_step = config.modules * (own + carried)
    if n == 1:
        return steps * per_step * _feature_elements(config) * _FLOAT / MB
    at_start = config.modules * own + carried
    segments = math.ceil(steps / n)
    lengths = [min(n, steps - i * n) for i in range(segments)]
    tensors = max(i * at_start + length * per_step for i, length in enumerate(lengths))
    return tensors * _feature_elements(config) * _FLOAT / MB


def predictions_mb(config: ModelConfig, steps: int) -> float:
    """The predicted clips and their gradients, per sample."""
    return 2 * steps * config.channels * config.clip * config.image_size**2 * _FLOAT / MB


def residue_mb(config: ModelConfig, steps: int) -> float:
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
        reservoirs = _RESERVOIR * _feature_elements(config)
        kept = math.ceil(steps / n) * reservoirs + (kept - reservoirs) * n / steps
    return kept / MB


def _feature_elements(config: ModelConfig) -> int:
    """Elements of one of the predictor's two streams, per sample: together they are the clip, rearranged."""
    return config.channels * config.clip * config.image_size**2 // 2


@contextmanager
def _no_collector() -> Iterator[None]:
    """With the cycle collector off, whatever is freed is freed because nothing refers to it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
