"""Batch normalisation in a second evaluation: with the statistics of the first, which are not computed again.

They are most of the work of batch normalisation on a CPU, and two numbers per channel. The same input gives the same
output, bit for bit.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from revgrad.layer import ReversibleLayer


class Statistics(NamedTuple):
    """Of a batch, per channel: `[C]` each."""

    mean: Tensor
    rstd: Tensor
    """One over the root of variance plus eps."""


Kept = dict[nn.Module, Statistics | None]
"""By module, the statistics that its call found; None where it was called several times or they cannot be had."""


def reusable(layer: ReversibleLayer, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Of the modules in a layer, the batch normalisations whose statistics serve again: as PyTorch has them, in train
    mode, of a layer that evaluates them once, on the very inputs of the first evaluation.
    """
    if layer.evaluations_in_rewind != 1:
        return []
    return [m for m in modules if type(m) in _KEEPING and m.training and "forward" not in m.__dict__]


def keeping(norms: list[nn.Module], kept: Kept) -> AbstractContextManager[None]:
    """Around the first evaluation: put the statistics of these modules there."""
    return _OfClasses(_KEEPING, norms, kept)


def reusing(norms: list[nn.Module], kept: Kept) -> AbstractContextManager[None]:
    """Around another evaluation: take them from there."""
    return _OfClasses(_REUSING, norms, kept)


class _OfClasses(AbstractContextManager[None]):
    """Around an evaluation: modules are of other classes."""

    # Classes, and not functions made for each time: code that torch.compile has made looks at them.
    def __init__(self, classes: dict[type, type], norms: list[nn.Module], kept: Kept) -> None:
        self._classes = classes
        self._norms = norms
        self._kept = kept

    def __enter__(self) -> None:
        self._usual = [type(module) for module in self._norms]
        for module, kind in zip(self._norms, self._usual, strict=True):
            object.__setattr__(module, "__class__", self._classes[kind])  # that of modules takes ten times as long
            module.__dict__["_kept"] = self._kept

    def __exit__(self, *rest: object) -> None:
        for module, kind in zip(self._norms, self._usual, strict=True):
            object.__setattr__(module, "__class__", kind)
            del module.__dict__["_kept"]


class _Keeping(_BatchNorm):
    """Batch normalisation that keeps its statistics."""

    _kept: Kept

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x)
        several, self._kept[self] = self in self._kept, None
        if several or x.ndim < 2 or x.numel() <= x.shape[1]:
            return super().forward(x)
        self._check_input_dim(x)
        factor, count = self.momentum or 0.0, self.num_batches_tracked if self.track_running_stats else None
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        if count is not None:
            count.add_(1)
            factor = 1 / float(count) if self.momentum is None else factor
        # What the usual forward comes down to; it does not hand out what else this returns.
        y, mean, rstd, _, kernel = torch._batch_norm_impl_index(
            x, self.weight, self.bias, *running, True, factor, self.eps, torch.backends.cudnn.enabled
        )
        if kernel == 0 and x.is_cpu and x.dtype in (torch.float32, torch.float64) and _is_dense(x):
            self._kept[self] = Statistics(mean, rstd)
        return y


class _Reusing(_BatchNorm):
    """Batch normalisation with the statistics kept."""

    _kept: Kept

    def forward(self, x: Tensor) -> Tensor:
        statistics = None if torch.compiler.is_compiling() else self._kept.get(self)
        if statistics is None:
            self._check_input_dim(x)
            # Without the running statistics, which have moved already, and do not count in train mode.
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        return _normalise(x, self.weight, self.bias, *statistics, self.eps)


def _is_dense(x: Tensor) -> bool:
    """Whether the memory layout is one of those for which PyTorch multiplies weight and statistics first."""
    if x.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])


def _variants(behaviour: type) -> dict[type, type]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return {kind: type(kind.__name__, (behaviour, kind), {}) for kind in kinds}


_KEEPING = _variants(_Keeping)
_REUSING = _variants(_Reusing)


class _Normalise(torch.autograd.Function):
    """`x a + (bias - mean a)`, `a = rstd weight`, and the gradient of batch normalisation, where mean and rstd depend
    on `x`.

    Saves the input `[B, C, ...]`, the weight and the statistics, as batch normalisation does.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps = eps
        # With a variance of 1 the kernel rounds as it does with statistics of its own: it first multiplies the weight
        # with the reciprocal root of the variance.
        scale = rstd if weight is None else rstd * weight
        return torch.native_batch_norm(x, scale, bias, mean, torch.ones_like(rstd), False, 0.0, 0.0)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        found = torch.ops.aten.native_batch_norm_backward.default(
            grad, x, weight, None, None, mean, rstd, True, ctx.eps, ctx.needs_input_grad[:3]
        )
        return *found, None, None, None


# What `apply` looks for before it comes to this, the wrappers of torch.func, is never in a second evaluation.
_normalise = super(torch.autograd.Function, _Normalise).apply
