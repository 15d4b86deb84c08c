"""The memory layout of a stream: what a transform has read is given to it again in the same one."""

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """A copy without gaps of a view with gaps (a chunk of channels): what a layout can be restored from."""
    if x.is_contiguous():
        return x
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x if span == x.numel() else x.contiguous()


def laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same values in another memory layout; a copy only if it must be."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
