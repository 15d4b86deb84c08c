"""The memory layout of a stream: what a transform has read is given to it again in the same one.

That is its strides, and that it is aligned as a tensor of its own is: libraries of linear algebra add in another order,
or choose another algorithm, where memory begins elsewhere.
"""

import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes that tensors of their own are aligned to, at least."""


def dense(x: Tensor) -> Tensor:
    """A copy of a view with gaps (a chunk of channels), without them, and of one that is not aligned (a time step):
    what a layout can be restored from.
    """
    if not x.is_contiguous():
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        if span != x.numel():
            return x.contiguous()
    return x if _aligned(x) else x.clone()


def laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same values in another memory layout, aligned; a copy only if it must be."""
    if x.stride() == strides and _aligned(x):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _aligned(x: Tensor) -> bool:
    # Where something is compiled nothing is run again, and a compiler cannot tell where memory begins.
    return torch.compiler.is_compiling() or x.storage_offset() * x.element_size() % _ALIGNMENT == 0
