"""Pixel shuffle on a CPU, where a permuted copy costs more for its short rows than for its elements.

All samples are moved alike. So the places of one sample's elements in memory, made once from the reference and kept,
move a whole batch in one call of `index_select`, in a third to all of the time of the copy.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from revgrad_kernels import pixel_shuffle_reference as reference
from revgrad_kernels.backend import left_to_cpu
from revgrad_kernels.layout import canonical, is_channels_last, laid_out_like

LARGEST = 2**18
"""Elements of a sample up to which their places are kept, then in a MiB."""
_KEPT = 32
"""For how many shapes."""

_UNSIGNED = frozenset({torch.uint16, torch.uint32, torch.uint64})
"""What PyTorch selects from rows alone."""

_Places = tuple[tuple[int, ...], tuple[Tensor, ...]]
"""The shape of a result, and per group of its channels where each element of a sample comes from, in memory."""
_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


def takes(backend: str, *tensors: Tensor) -> bool:
    """Whether this code is for these tensors: data on a CPU, and nobody looking who needs the reference's graph."""
    if not left_to_cpu(backend) or _modes():
        return False
    for x in tensors:
        if not (x.is_cpu and type(x) is Tensor and x.ndim in (4, 5) and 0 < x.numel() <= LARGEST * x.shape[0]):
            return False
    return True


def unshuffle(operator: str, x: Tensor, n: int, order: str, groups: int = 1) -> Sequence[Tensor]:
    """As the reference, which is asked for checks and places when a shape is new."""
    if x.shape[0] > 1 and x.requires_grad and torch.is_grad_enabled():
        return _Unshuffle.apply(operator, x, n, order, groups)
    return _unshuffled(operator, x, n, order, groups)


def shuffle(operator: str, parts: Sequence[Tensor], n: int, order: str) -> Tensor:
    """As `unshuffle`, the other way; all parts have one shape and dtype."""
    if parts[0].shape[0] > 1 and torch.is_grad_enabled() and any(x.requires_grad for x in parts):
        return _Shuffle.apply(operator, n, order, *parts)
    return _shuffled(operator, parts, n, order)


class _Unshuffle(torch.autograd.Function):
    """Its gradient is the inverse, moved likewise: that of `index_select` takes several times as long for a batch."""

    @staticmethod
    def forward(ctx: Any, operator: str, x: Tensor, n: int, order: str, groups: int) -> tuple[Tensor, ...]:
        ctx.how = operator, n, order
        return tuple(_unshuffled(operator, x, n, order, groups))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operator, n, order = ctx.how
        return None, shuffle(operator, grads, n, order), None, None, None


class _Shuffle(torch.autograd.Function):
    """As `_Unshuffle`."""

    @staticmethod
    def forward(ctx: Any, operator: str, n: int, order: str, *parts: Tensor) -> Tensor:
        ctx.how = operator, n, order, len(parts)
        return _shuffled(operator, parts, n, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operator, n, order, groups = ctx.how
        return None, None, None, *unshuffle(operator, grad, n, order, groups)


def _unshuffled(operator: str, x: Tensor, n: int, order: str, groups: int) -> list[Tensor]:
    last = not x.is_contiguous() and is_channels_last(x)
    shape, places = _folding(operator, x.shape, n, order, groups, last)
    return [_moved(x, own, shape, last) for own in places]


def _shuffled(operator: str, parts: Sequence[Tensor], n: int, order: str) -> Tensor:
    x, *second = parts
    if second:
        x = canonical(x)
    last = not x.is_contiguous() and is_channels_last(x)
    if second:
        x = torch.cat((x, laid_out_like(x, *second)), 1)
    shape, (places,) = _unfolding(operator, x.shape, n, order, last)
    return _moved(x, places, shape, last)


@lru_cache(_KEPT)
def _folding(operator: str, shape: torch.Size, n: int, order: str, groups: int, last: bool) -> _Places:
    reference.check_unshuffle(operator, shape, n, groups)
    with torch.inference_mode(False):  # the places serve outside as well
        return _places(shape[0], reference.unshuffle(_numbered(shape, last), n, order, groups), last)


@lru_cache(_KEPT)
def _unfolding(operator: str, shape: torch.Size, n: int, order: str, last: bool) -> _Places:
    reference.check_shuffle(operator, shape, n)
    with torch.inference_mode(False):
        return _places(shape[0], [reference.shuffle([_numbered(shape, last)], n, order)], last)


def _numbered(shape: torch.Size, last: bool) -> Tensor:
    """One sample of this shape, of the numbers of its elements in memory."""
    _, c, *size = shape
    numbers = torch.arange(math.prod(shape[1:]), dtype=torch.int32, device="cpu")
    return numbers.view(1, *size, c).movedim(-1, 1) if last else numbers.view(1, c, *size)


def _places(batch: int, moved: list[Tensor], last: bool) -> _Places:
    return (batch, *moved[0].shape[1:]), tuple(_in_memory(x, last).flatten() for x in moved)


def _in_memory(x: Tensor, last: bool) -> Tensor:
    """The axes in the order of memory."""
    return x.movedim(1, -1) if last else x


def _moved(x: Tensor, places: Tensor, shape: tuple[int, ...], last: bool) -> Tensor:
    rows, batch = _in_memory(x, last), shape[0]
    # The first of each two does what the second does, without a microsecond or two, for all but a few dtypes.
    alone = batch == 1 and x.dtype not in _UNSIGNED
    rows = rows.reshape(-1).index_select(0, places) if alone else rows.reshape(batch, -1).index_select(1, places)
    return rows.view(*shape) if not last else rows.view(batch, *shape[2:], shape[1]).movedim(-1, 1)
