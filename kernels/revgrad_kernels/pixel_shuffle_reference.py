"""Pixel shuffle in plain PyTorch: it defines what the operator computes, and moves what is large on a CPU.

Memory layouts and orders of channels as in `pixel_shuffle`.
"""

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from revgrad_kernels.layout import canonical, is_channels_last, laid_out_like

_ORDERS = ("pytorch", "irevnet")
_FOLD = {"pytorch": (0, 1, 4, 6, 2, 3, 5), "irevnet": (0, 4, 6, 1, 2, 3, 5)}
"""From the axes `b c t h i w j` to those of the result, where channels are `c i j` or `i j c`; all contiguous."""
_UNFOLD = {"pytorch": (0, 1, 4, 5, 2, 6, 3), "irevnet": (0, 3, 4, 5, 1, 6, 2)}
"""And back."""


def unshuffle(x: Tensor, n: int, order: str, groups: int = 1) -> list[Tensor]:
    """Fold by `n` and cut the channels into so many groups, one or two; `x` is as the operators check it."""
    b, c, *frames, h, w = x.shape
    last = is_channels_last(x)
    t, h, w = frames[0] if frames else 1, h // n, w // n
    shape = (b, c * n * n // groups, *frames, h, w)
    if last:
        axis = 4
        folded = x.movedim(1, -1).view(b, t, h, n, w, n, c).transpose(3, 4)
        if order == "pytorch":
            # Two copies, in runs of channels and then a transposition, take a tenth of the time of one in runs of n.
            # Flattened in between, they are two in backward as well.
            folded = _copy(folded).flatten(4).view(b, t, h, w, n, n, c).permute(0, 1, 2, 3, 6, 4, 5)
    else:
        axis = 1
        folded = x.view(b, c, t, h, n, w, n).permute(_FOLD[order])
    if groups == 1:
        return [_of_shape(_copy(folded), shape, last)]
    outermost = next((a for a in range(axis, axis + 3) if folded.shape[a] != 1), axis)
    if folded.shape[outermost] % 2:
        folded, outermost = _copy(folded).flatten(axis, axis + 2), axis
    return [_of_shape(_copy(part), shape, last) for part in folded.chunk(2, outermost)]


def shuffle(parts: Sequence[Tensor], n: int, order: str) -> Tensor:
    """Put the groups side by side and unfold them by `n`; they are as the operators check them."""
    first = parts[0]
    b, k, *frames, h, w = first.shape
    c, t = len(parts) * k // (n * n), frames[0] if frames else 1
    last = is_channels_last(first)
    sizes, names, halved = ([c, n, n], "cij", "") if order == "pytorch" else ([n, n, c], "ijc", "")
    if len(parts) == 2:
        outermost = next((a for a in range(3) if sizes[a] != 1), 0)
        if sizes[outermost] % 2:
            first = canonical(first)
            parts = [torch.cat([laid_out_like(first, part) for part in parts], 1)]
        else:
            sizes[outermost] //= 2
            halved = names[outermost]
    if not last:
        views = [part.view(b, *sizes, t, h, w).permute(_UNFOLD[order]) for part in parts]
        x = _joined(views, "bcthiwj", halved)
    else:
        views = [part.movedim(1, -1).view(b, t, h, w, *sizes) for part in parts]
        if order == "pytorch":
            views = [view.permute(0, 1, 2, 3, 5, 6, 4) for view in views]
            views = [_joined(views, "bthwijc", halved).flatten(4).view(b, t, h, w, n, n, c)]
        x = _joined([view.transpose(3, 4) for view in views], "bthiwjc", halved)
    return _of_shape(x, (b, c, *frames, h * n, w * n), last)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _joined(views: list[Tensor], axes: str, halved: str) -> Tensor:
    """The halves side by side along their axis of this name, or a copy of the one that is not halved."""
    return torch.cat(views, axes.index(halved)) if len(views) == 2 else _copy(views[0])


def _of_shape(x: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """A contiguous tensor as one of this shape, whose axes it has in the order of memory."""
    if not channels_last:
        return x.view(shape)
    batch, channels, *size = shape
    return x.view(batch, *size, channels).movedim(-1, 1)


def checked_factor(operator: str, factor: Any, order: str) -> int:
    """The factor, as an integer.

    Raises:
        TypeError: It is none, in the operator's name.
        ValueError: There is no such order.
    """
    if order not in _ORDERS:
        raise ValueError(f"{operator}: order must be one of {', '.join(_ORDERS)}, got {order!r}")
    if type(factor) is int:
        return factor
    try:
        return int(index(factor))
    except TypeError:
        raise TypeError(f"{operator}: the factor must be an integer, got {factor!r}") from None


def _check(operator: str, shape: torch.Size) -> None:
    if len(shape) not in (4, 5):
        raise ValueError(f"{operator}: expected [B, C, H, W] or [B, C, T, H, W], got shape {tuple(shape)}")


def check_unshuffle(operator: str, shape: torch.Size, factor: int, groups: int = 1) -> None:
    """Raise ValueError, in the operator's name, unless a tensor of this shape can be folded."""
    _check(operator, shape)
    *_, height, width = shape
    if factor < 1 or height % factor or width % factor:
        raise ValueError(
            f"{operator}: {height} x {width} pixels cannot be folded by {factor}; "
            "pad or resize the frames to a multiple of the factor"
        )
    channels = shape[1] * factor**2
    if channels % groups:
        raise ValueError(
            f"{operator}: {shape[1]} channels folded by {factor} are {channels}, of which there are no two halves; "
            "use pixel_unshuffle and split as needed"
        )


def check_shuffle(operator: str, shape: torch.Size, factor: int, groups: int = 1) -> None:
    """Raise ValueError, in the operator's name, unless so many groups of this shape can be unfolded."""
    _check(operator, shape)
    channels = groups * shape[1]
    if factor < 1 or channels % factor**2:
        raise ValueError(f"{operator}: {channels} channels are not a multiple of {factor} x {factor}")
