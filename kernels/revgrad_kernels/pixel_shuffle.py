"""Bijective down- and upsampling between space and channels, in two and three dimensions (CrevNet, section 2.1).

`pixel_unshuffle` turns `(c, h, w)` into `(c n^2, h / n, w / n)`, `pixel_shuffle` back; each is the other's backward. In
three dimensions only space is folded, never time. `pixel_unshuffle_split` cuts the folded channels into two halves in
the same pass over memory, and `pixel_shuffle_concatenate` undoes that.

Where the pixel at row offset `i` and column offset `j` of input channel `c` goes is the `order`, with C input channels:

- `pytorch`: output channel `c n^2 + i n + j`, as in `torch.nn.functional.pixel_unshuffle` (Shi et al. 2016; ONNX: CRD).
- `irevnet`: output channel `(i n + j) C + c`, as `psi` of i-RevNet (Jacobsen et al. 2018,
  github.com/jhjacobsen/pytorch-i-revnet) and `space_to_depth` of TensorFlow (ONNX: DCR).

With one input channel they are the same. The result is a tensor of its own without gaps, channels-last if the input is
and else contiguous.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from revgrad_kernels import pixel_shuffle_cpu as on_cpu
from revgrad_kernels import pixel_shuffle_reference as reference
from revgrad_kernels.backend import can_run, on_device, tl, triton, uses_triton
from revgrad_kernels.layout import (
    canonical,
    is_channels_last,
    laid_out_like,
    memory_format,
    size_class,
    tiles_across,
    tuned,
)

Order = Literal["pytorch", "irevnet"]

_RUN = 128
"""Longest run of elements that a tile writes before its next row, whose pixels lie between those just read."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What the kernel takes elements for, by their size: it moves them and never looks inside."""


def pixel_unshuffle(x: Tensor, factor: int, *, order: Order = "pytorch", backend: str = "auto") -> Tensor:
    """Fold space into channels: `[B, C, (T,) H, W]` to `[B, C n^2, (T,) H / n, W / n]`.

    Args:
        x: Any dtype; its dtype and memory layout are those of the result.
        factor: n, at least 1.
        order: Of the output channels: `pytorch` or `irevnet`; see the module.
        backend: `auto`, `triton` or `reference`; see `revgrad_kernels.backend`.

    Raises:
        TypeError: The factor is no integer.
        ValueError: Not a 4D or 5D tensor, no such order, or height or width is not a multiple of the factor.
        BackendError: The backend cannot compute this.
    """
    factor = reference.checked_factor("pixel_unshuffle", factor, order)
    if on_cpu.takes(backend, x):
        return on_cpu.unshuffle("pixel_unshuffle", x, factor, order)[0]
    reference.check_unshuffle("pixel_unshuffle", x.shape, factor)
    if uses_triton(backend, x, operator="pixel_unshuffle"):
        return _pixel_unshuffle(x, factor, order)
    return reference.unshuffle(x, factor, order)[0]


def pixel_shuffle(x: Tensor, factor: int, *, order: Order = "pytorch", backend: str = "auto") -> Tensor:
    """Unfold channels into space: `[B, C n^2, (T,) H, W]` to `[B, C, (T,) H n, W n]`.

    Arguments as in `pixel_unshuffle`, of which this is the inverse.

    Raises:
        TypeError: The factor is no integer.
        ValueError: Not a 4D or 5D tensor, no such order, or the channels are not a multiple of the squared factor.
        BackendError: The backend cannot compute this.
    """
    factor = reference.checked_factor("pixel_shuffle", factor, order)
    if on_cpu.takes(backend, x):
        return on_cpu.shuffle("pixel_shuffle", [x], factor, order)
    reference.check_shuffle("pixel_shuffle", x.shape, factor)
    if uses_triton(backend, x, operator="pixel_shuffle"):
        return _pixel_shuffle(x, factor, order)
    return reference.shuffle([x], factor, order)


def pixel_unshuffle_split(
    x: Tensor, factor: int, *, order: Order = "pytorch", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`pixel_unshuffle` with the first and the second half of its channels as tensors of their own.

    Arguments as there; `[B, C, (T,) H, W]` to two of `[B, C n^2 / 2, (T,) H / n, W / n]`.

    Raises:
        ValueError: As there, or the number of folded channels is odd.
        BackendError: The backend cannot compute this.
    """
    factor = reference.checked_factor("pixel_unshuffle_split", factor, order)
    if on_cpu.takes(backend, x):
        first, second = on_cpu.unshuffle("pixel_unshuffle_split", x, factor, order, groups=2)
        return first, second
    reference.check_unshuffle("pixel_unshuffle_split", x.shape, factor, groups=2)
    if uses_triton(backend, x, operator="pixel_unshuffle_split"):
        return _pixel_unshuffle_split(x, factor, order)
    first, second = reference.unshuffle(x, factor, order, groups=2)
    return first, second


def pixel_shuffle_concatenate(
    first: Tensor, second: Tensor, factor: int, *, order: Order = "pytorch", backend: str = "auto"
) -> Tensor:
    """The inverse of `pixel_unshuffle_split`: `pixel_shuffle` of two tensors with their channels one after the other.

    Args:
        first: `[B, C n^2 / 2, (T,) H, W]`; its memory layout is that of the result.
        second: Of the same shape and dtype.
        factor: As in `pixel_unshuffle`, like all that follow.
        order: Of the concatenated channels.
        backend: Which code computes.

    Raises:
        ValueError: As in `pixel_shuffle`, or the two differ in shape or dtype.
        BackendError: The backend cannot compute this.
    """
    factor = reference.checked_factor("pixel_shuffle_concatenate", factor, order)
    if first.shape != second.shape or first.dtype != second.dtype:
        raise ValueError(
            "pixel_shuffle_concatenate: the two groups must have the same shape and dtype, got "
            f"{tuple(first.shape)} {first.dtype} and {tuple(second.shape)} {second.dtype}; "
            "concatenate groups of unequal channels and use pixel_shuffle"
        )
    if on_cpu.takes(backend, first, second):
        return on_cpu.shuffle("pixel_shuffle_concatenate", [first, second], factor, order)
    reference.check_shuffle("pixel_shuffle_concatenate", first.shape, factor, groups=2)
    if uses_triton(backend, first, second, operator="pixel_shuffle_concatenate"):
        return _pixel_shuffle_concatenate(first, second, factor, order)
    return reference.shuffle([first, second], factor, order)


@triton.jit(do_not_specialize=["size"])
def _kernel(
    unfolded_ptr, first_ptr, second_ptr, rows, columns, channels, width, size,
    N: tl.constexpr, FOLD: tl.constexpr, SPLIT: tl.constexpr, IREVNET: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # Rows and columns are such that stores are coalesced. Where the loads of a row lie n or n^2 elements apart, the
    # next rows of the same tile load what is between them, then from the cache.
    HEIGHT: tl.constexpr = TILE // WIDTH
    BLOCK: tl.constexpr = N * N
    program, across = tl.program_id(0).to(tl.int64), tiles_across(columns, WIDTH)
    row, column = program // across * HEIGHT, program % across * WIDTH
    down, right = tl.arange(0, HEIGHT)[:, None], tl.arange(0, WIDTH)[None, :]
    mask = (row + down < rows) & (column + right < columns)
    group = channels * BLOCK // 2 if SPLIT else channels * BLOCK
    # Folded channel k holds pixel s = i n + j of the blocks of channel c; its pixel (y, w) has y counted through all
    # frames. A singular and its plural are the two summands of one index, see `_divided`.
    if CHANNELS_LAST:
        if FOLD:  # [pixels, k]
            pixel, pixels = row, down
            k = column.to(tl.int32) + right
            if IREVNET:
                s, c = k // channels, k % channels
            else:
                s, c = k % BLOCK, k // BLOCK
        else:  # [(pixels, s), c]
            pixel, pixels, s = _divided(row, down, BLOCK)
            c = column.to(tl.int32) + right
            k = s * channels + c if IREVNET else c * BLOCK + s
        line, lines, w = _divided(pixel, pixels, width)
        corner = ((line + lines) * N * width + w) * N
        inside = (s // N).to(tl.int64) * width * N + s % N
        unfolded = corner * channels + (inside * channels + c) if FOLD else (corner + inside) * channels + c
        folded = (pixel + pixels) * group + k
        to_second = tl.cast(group, tl.int64)
    else:
        if FOLD:  # [(planes, s), (y, w)]
            plane, planes, s = _divided(row, down, BLOCK)
            sample, samples, c = _divided(plane, planes, channels)
            k = s * channels + c if IREVNET else c * BLOCK + s
            y, ys, w = _divided(column, right, width)
            corner = (plane + planes) * columns * BLOCK + (s // N) * (width * N) + s % N
            unfolded = corner + ((y + ys) * N * width + w) * N
            folded = ((sample + samples) * group + k) * columns + (column + right)
            to_second = tl.cast(group, tl.int64) * columns
        else:  # [planes, (y, i, w, j)]
            sample, samples, c = _divided(row, down, channels)
            line, lines, place = _divided(column, right, width * N)
            y, ys, i = _divided(line, lines, N)
            s = i * N + place % N
            unfolded = (row + down) * columns + (column + right)
            area = columns // BLOCK
            inside = s.to(tl.int64) * area * (channels if IREVNET else 1) + (y + ys) * width + place // N
            folded = ((sample + samples) * group + c * (1 if IREVNET else BLOCK)) * area + inside
            k = s * channels + c if IREVNET else c * BLOCK + s
            to_second = tl.cast(group, tl.int64) * area
    in_second = k >= group
    second_ptr -= to_second
    if FOLD:
        values = tl.load(unfolded_ptr + unfolded, mask)
        tl.store(first_ptr + folded, values, mask & ~in_second)
        if SPLIT:
            tl.store(second_ptr + folded, values, mask & in_second)
    else:
        values = tl.load(first_ptr + folded, mask & ~in_second)
        if SPLIT:
            values = tl.where(in_second, tl.load(second_ptr + folded, mask & in_second), values)
        tl.store(unfolded_ptr + unfolded, values, mask)


@triton.jit
def _divided(start, more, divisor):
    """`start + more` by the divisor: the quotient, likewise in two summands, and the remainder.

    `start` is one number in 64 bits, where division is slow; `more` is many in 32, as are divisor and remainder.
    """
    more += (start % divisor).to(tl.int32)
    return start // divisor, more // divisor, more % divisor


_tuned = tuned(_kernel)


def _launch_fold(x: Tensor, factor: int, order: str, groups: int = 1) -> list[Tensor]:
    x = canonical(x)
    parts = [_empty_like(x, _folded_shape(x, factor, groups)) for _ in range(groups)]
    _launch(x, parts, factor, order, is_channels_last(x), fold=True)
    return parts


def _launch_unfold(parts: list[Tensor], factor: int, order: str) -> Tensor:
    first = canonical(parts[0])
    x = _empty_like(first, _unfolded_shape(first, factor, len(parts)))
    parts = [laid_out_like(first, part) for part in parts]
    _launch(x, parts, factor, order, is_channels_last(first), fold=False)
    return x


def _launch(unfolded: Tensor, parts: list[Tensor], n: int, order: str, channels_last: bool, fold: bool) -> None:
    if not unfolded.numel():
        return
    _, channels, frames, height, width = _extent(unfolded)
    pixels = frames * height * width
    folded_columns = channels * n**2 if channels_last else pixels // n**2
    unfolded_columns = channels if channels_last else pixels
    columns = folded_columns if fold else unfolded_columns
    rows, run = unfolded.numel() // columns, min(triton.next_power_of_2(columns), _RUN)
    bits = _BITS[unfolded.element_size()]
    with on_device(unfolded):
        _tuned[lambda meta: (triton.cdiv(rows, meta["TILE"] // run) * triton.cdiv(columns, run),)](
            unfolded.view(bits), parts[0].view(bits), parts[-1].view(bits),
            rows, columns, channels, width // n, size_class(unfolded.numel()),
            N=n, FOLD=fold, SPLIT=len(parts) == 2, IREVNET=order == "irevnet", CHANNELS_LAST=channels_last, WIDTH=run,
        )  # fmt: skip


@torch.library.custom_op("revgrad::pixel_unshuffle", mutates_args=())
def _pixel_unshuffle(x: Tensor, factor: int, order: str) -> Tensor:
    if _kernel_moves(x):
        return _launch_fold(x, factor, order)[0]
    return reference.unshuffle(x, factor, order)[0]


@torch.library.custom_op("revgrad::pixel_shuffle", mutates_args=())
def _pixel_shuffle(y: Tensor, factor: int, order: str) -> Tensor:
    if _kernel_moves(y):
        return _launch_unfold([y], factor, order)
    return reference.shuffle([y], factor, order)


@torch.library.custom_op("revgrad::pixel_unshuffle_split", mutates_args=())
def _pixel_unshuffle_split(x: Tensor, factor: int, order: str) -> tuple[Tensor, Tensor]:
    if _kernel_moves(x):
        first, second = _launch_fold(x, factor, order, groups=2)
    else:
        first, second = reference.unshuffle(x, factor, order, groups=2)
    return first, second


@torch.library.custom_op("revgrad::pixel_shuffle_concatenate", mutates_args=())
def _pixel_shuffle_concatenate(first: Tensor, second: Tensor, factor: int, order: str) -> Tensor:
    if _kernel_moves(first):
        return _launch_unfold([first, second], factor, order)
    return reference.shuffle([first, second], factor, order)


@_pixel_unshuffle.register_fake
def _(x: Tensor, factor: int, order: str) -> Tensor:
    return _empty_like(x, _folded_shape(x, factor))


@_pixel_shuffle.register_fake
def _(y: Tensor, factor: int, order: str) -> Tensor:
    return _empty_like(y, _unfolded_shape(y, factor))


@_pixel_unshuffle_split.register_fake
def _(x: Tensor, factor: int, order: str) -> tuple[Tensor, Tensor]:
    shape = _folded_shape(x, factor, groups=2)
    return _empty_like(x, shape), _empty_like(x, shape)


@_pixel_shuffle_concatenate.register_fake
def _(first: Tensor, second: Tensor, factor: int, order: str) -> Tensor:
    return _empty_like(first, _unfolded_shape(first, factor, groups=2))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *_, ctx.factor, ctx.order = inputs


def _unshuffle_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _pixel_shuffle(grad, ctx.factor, ctx.order), None, None


def _shuffle_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _pixel_unshuffle(grad, ctx.factor, ctx.order), None, None


def _split_backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor | None, ...]:
    return _pixel_shuffle_concatenate(first, second, ctx.factor, ctx.order), None, None


def _concatenate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_pixel_unshuffle_split(grad, ctx.factor, ctx.order), None, None


_pixel_unshuffle.register_autograd(_unshuffle_backward, setup_context=_remember)
_pixel_shuffle.register_autograd(_shuffle_backward, setup_context=_remember)
_pixel_unshuffle_split.register_autograd(_split_backward, setup_context=_remember)
_pixel_shuffle_concatenate.register_autograd(_concatenate_backward, setup_context=_remember)


def _kernel_moves(x: Tensor) -> bool:
    """All but complex128, whose elements Triton has no integers for."""
    return can_run(x.device) and x.element_size() in _BITS


def _extent(x: Tensor) -> tuple[int, int, int, int, int]:
    """Batch, channels, frames (one in two dimensions), height and width."""
    b, c, *t, h, w = x.shape
    return b, c, t[0] if t else 1, h, w


def _folded_shape(x: Tensor, n: int, groups: int = 1) -> tuple[int, ...]:
    return x.shape[0], x.shape[1] * n**2 // groups, *x.shape[2:-2], x.shape[-2] // n, x.shape[-1] // n


def _unfolded_shape(y: Tensor, n: int, groups: int = 1) -> tuple[int, ...]:
    return y.shape[0], y.shape[1] * groups // n**2, *y.shape[2:-2], y.shape[-2] * n, y.shape[-1] * n


def _empty_like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
