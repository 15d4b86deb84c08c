"""Memory layouts that the kernels understand, and how work is cut into tiles.

A tensor `[B, C, ...]` is canonical if it is contiguous or channels-last. Either way it is a matrix without gaps whose
rows, or whose columns, are channels.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revgrad_kernels.backend import HAS_TRITON, INTERPRETED, tl, triton

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_SMALLEST_TILE = 1024


def is_channels_last(x: Tensor) -> bool:
    """Whether a tensor without gaps keeps its channels last, and is not contiguous as well."""
    layout = _CHANNELS_LAST.get(x.ndim)
    try:
        return layout is not None and not x.is_contiguous() and x.is_contiguous(memory_format=layout)
    except RuntimeError:  # a sample inside vmap, which has no such layout
        return False


def canonical(x: Tensor) -> Tensor:
    """The tensor itself if it is contiguous or channels-last, else a contiguous copy."""
    return x if is_channels_last(x) else x.contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    """Of a canonical tensor."""
    return _CHANNELS_LAST[x.ndim] if is_channels_last(x) else torch.contiguous_format


def laid_out_like(x: Tensor, t: Tensor) -> Tensor:
    """`t`, of the rank of the canonical `x`, in its memory layout; a copy only if it must be."""
    return t.contiguous(memory_format=memory_format(x))


def side_by_side_like(x: Tensor, groups: int) -> Tensor:
    """An empty tensor for so many groups of channels, each like the canonical `x`, in its memory layout."""
    shape = (x.shape[0], groups * x.shape[1], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def gapless(bias: Tensor | None) -> Tensor | None:
    """As kernels read it, without gaps."""
    return None if bias is None else bias.contiguous()


def expanded(operator: str, x: Tensor, **tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, each broadcast to the shape of `x`; their gradients are summed as they should be.

    Raises:
        ValueError: One does not broadcast to it; names operator and argument.
    """
    shape, found = x.shape, []
    for name, t in tensors.items():
        if t.shape != shape:
            padded = (1,) * (x.ndim - t.ndim) + tuple(t.shape)
            if len(padded) != x.ndim or any(n not in (1, wanted) for n, wanted in zip(padded, shape, strict=True)):
                raise ValueError(f"{operator}: {name} {tuple(t.shape)} does not broadcast to {tuple(shape)}")
            t = t.expand_as(x)
        found.append(t)
    return tuple(found)


@dataclass(frozen=True)
class Matrix:
    """A canonical tensor as rows and columns."""

    rows: int
    columns: int

    @property
    def width(self) -> int:
        """Columns of a tile: a power of two, never more than a tile has elements."""
        return min(triton.next_power_of_2(max(1, self.columns)), _SMALLEST_TILE)

    def grid(self, meta: dict[str, Any]) -> tuple[int]:
        """Number of programs, given the elements of a tile as `TILE`."""
        return (triton.cdiv(self.rows, meta["TILE"] // self.width) * triton.cdiv(self.columns, self.width),)


def elements(x: Tensor) -> Matrix:
    """Where channels do not matter: one element a row."""
    return Matrix(x.numel(), 1)


def channels(x: Tensor) -> Matrix:
    """`[B, C, ...]` with one channel a row if contiguous (row r is channel r mod C), one a column if channels-last."""
    columns = x.shape[1] if channels_are_columns(x) else math.prod(x.shape[2:])
    return Matrix(x.numel() // max(1, columns), columns)


def channels_are_columns(x: Tensor) -> bool:
    """Which of the two `channels` makes of a canonical tensor."""
    return is_channels_last(x) or x.ndim == 2


def samples(x: Tensor) -> Matrix:
    """`[B, C, ...]` with rows in which the channels are together: a sample if contiguous, a pixel if channels-last.

    Side by side in a row of a tensor with n C channels lie n groups of as many columns as this matrix has.
    """
    columns = x.shape[1] if is_channels_last(x) else math.prod(x.shape[1:])
    return Matrix(x.numel() // max(1, columns), columns)


@triton.jit
def tile(rows, columns, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """The rows `[TILE / WIDTH, 1]`, columns `[1, WIDTH]` and mask of this program, in 64 bits."""
    HEIGHT: tl.constexpr = TILE // WIDTH
    across = tiles_across(columns, WIDTH)
    program = tl.program_id(0).to(tl.int64)
    row = (program // across) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    column = (program % across) * WIDTH + tl.arange(0, WIDTH)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def tiles_across(columns, WIDTH: tl.constexpr):
    """As `tl.cdiv`, of at least one column, without a sum that 32 bits might not hold."""
    return (columns - 1) // WIDTH + 1


def size_class(numel: int) -> int:
    """Tensors of one class share a tuning: 0 is launch-bound, 1 fits the cache of a GPU, 2 streams from memory."""
    return (numel > 2**16) + (numel > 2**22)


def configurations() -> list[Any]:
    """What a pointwise kernel is tuned over: elements of a tile, and warps.

    4 warps with 1024 elements are 8 elements a thread, two 16-byte loads in float32: the least that keeps a memory
    bus busy. Larger tiles spend less on indices and more on registers. Not yet measured on a GPU.
    """
    sizes = [(_SMALLEST_TILE, 4)] if INTERPRETED else [(_SMALLEST_TILE, 4), (2048, 8), (4096, 8)]
    return [triton.Config({"TILE": size}, num_warps=warps) for size, warps in sizes]


def tuned(kernel: Any) -> Any:
    """The kernel, tuned once per class of sizes, dtype and variant; the choice is kept on disk, so later runs do not
    tune.

    The kernel must take `size`, a `size_class`, and write each output wholly whatever the tile. `size` is for tuning
    alone: a kernel that were compiled for its values would be compiled three times.
    """
    return triton.autotune(configs=configurations(), key=["size", *_variants(kernel)], cache_results=True)(kernel)


def _variants(kernel: Any) -> list[str]:
    """The constants of a kernel that change its work: the first caller must not decide for a mirrored layout.

    Not the dtypes among them, `WIDE` and `INDEX`: those of the tensors are in every key, and the file on disk holds
    none.
    """
    parameters = inspect.signature(kernel.fn).parameters.values() if HAS_TRITON else []
    return [p.name for p in parameters if p.annotation is tl.constexpr and p.name not in ("TILE", "WIDE", "INDEX")]
