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

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from revgrad_kernels.backend import can_run, fused, on_device, tl, triton
from revgrad_kernels.layout import canonical, is_channels_last, laid_out_like, memory_format, size_class, tuned

Order = Literal["pytorch", "irevnet"]
_ORDERS = get_args(Order)

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
        ValueError: Not a 4D or 5D tensor, no such order, or height or width is not a multiple of the factor.
        BackendError: The backend cannot compute this.
    """
    _check_unshuffle("pixel_unshuffle", x, factor, order)
    if fused(backend, x):
        return _pixel_unshuffle(x, factor, order)
    return _reference_unshuffle(x, factor, order)[0]


def pixel_shuffle(x: Tensor, factor: int, *, order: Order = "pytorch", backend: str = "auto") -> Tensor:
    """Unfold channels into space: `[B, C n^2, (T,) H, W]` to `[B, C, (T,) H n, W n]`.

    Arguments as in `pixel_unshuffle`, of which this is the inverse.

    Raises:
        ValueError: Not a 4D or 5D tensor, no such order, or the channels are not a multiple of the squared factor.
        BackendError: The backend cannot compute this.
    """
    _check_shuffle("pixel_shuffle", x, factor, order)
    if fused(backend, x):
        return _pixel_shuffle(x, factor, order)
    return _reference_shuffle([x], factor, order)


def pixel_unshuffle_split(
    x: Tensor, factor: int, *, order: Order = "pytorch", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`pixel_unshuffle` with the first and the second half of its channels as tensors of their own.

    Arguments as there; `[B, C, (T,) H, W]` to two of `[B, C n^2 / 2, (T,) H / n, W / n]`.

    Raises:
        ValueError: As there, or the number of folded channels is odd.
        BackendError: The backend cannot compute this.
    """
    _check_unshuffle("pixel_unshuffle_split", x, factor, order)
    if x.shape[1] * factor**2 % 2:
        raise ValueError(
            f"pixel_unshuffle_split: {x.shape[1]} channels folded by {factor} are {x.shape[1] * factor**2}, "
            "of which there are no two halves; use pixel_unshuffle and split as needed"
        )
    if fused(backend, x):
        return _pixel_unshuffle_split(x, factor, order)
    first, second = _reference_unshuffle(x, factor, order, groups=2)
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
    if first.shape != second.shape or first.dtype != second.dtype:
        raise ValueError(
            "pixel_shuffle_concatenate: the two groups must have the same shape and dtype, got "
            f"{tuple(first.shape)} {first.dtype} and {tuple(second.shape)} {second.dtype}; "
            "concatenate groups of unequal channels and use pixel_shuffle"
        )
    _check_shuffle("pixel_shuffle_concatenate", first, factor, order, groups=2)
    if fused(backend, first, second):
        return _pixel_shuffle_concatenate(first, second, factor, order)
    return _reference_shuffle([first, second], factor, order)


_FOLD = {"pytorch": (0, 1, 4, 6, 2, 3, 5), "irevnet": (0, 4, 6, 1, 2, 3, 5)}
"""From the axes `b c t h i w j` to those of the result, where channels are `c i j` or `i j c`; all contiguous."""
_UNFOLD = {"pytorch": (0, 1, 4, 5, 2, 6, 3), "irevnet": (0, 3, 4, 5, 1, 6, 2)}
"""And back."""


_NATIVE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SMALL = 2**13
"""Elements below which a call that does all is the fastest on a CPU."""


def _native(x: Tensor, channels: int, order: str) -> bool:
    """Whether PyTorch's own operators apply: two dimensions, their order (with one channel there is only one)."""
    return x.ndim == 4 and x.numel() > 0 and x.dtype in _NATIVE_DTYPES and (order == "pytorch" or channels == 1)


def _reference_unshuffle(x: Tensor, n: int, order: str, groups: int = 1) -> list[Tensor]:
    b, c, *frames, h, w = x.shape
    last = is_channels_last(x)
    if n > 1 and _native(x, c, order) and (x.numel() < _SMALL or (c < 8 and last)):
        folded = F.pixel_unshuffle(x, n)
        if groups == 1:
            return [laid_out_like(x, folded)]
        return [half.clone(memory_format=memory_format(x)) for half in folded.chunk(2, 1)]
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


def _reference_shuffle(parts: Sequence[Tensor], n: int, order: str) -> Tensor:
    first = parts[0]
    b, k, *frames, h, w = first.shape
    c, t = len(parts) * k // (n * n), frames[0] if frames else 1
    last = is_channels_last(first)
    if n > 1 and len(parts) == 1 and _native(first, c, order) and (first.numel() < _SMALL or last):
        return laid_out_like(first, F.pixel_shuffle(first, n))
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


@triton.jit
def _kernel(
    unfolded_ptr, first_ptr, second_ptr, rows, columns, channels, width, size,
    N: tl.constexpr, FOLD: tl.constexpr, SPLIT: tl.constexpr, IREVNET: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # Rows and columns are such that stores are coalesced. Where the loads of a row lie n or n^2 elements apart, the
    # next rows of the same tile load what is between them, then from the cache.
    HEIGHT: tl.constexpr = TILE // WIDTH
    BLOCK: tl.constexpr = N * N
    program, across = tl.program_id(0).to(tl.int64), tl.cdiv(columns, WIDTH)
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
    return _reference_unshuffle(x, factor, order)[0]


@torch.library.custom_op("revgrad::pixel_shuffle", mutates_args=())
def _pixel_shuffle(y: Tensor, factor: int, order: str) -> Tensor:
    if _kernel_moves(y):
        return _launch_unfold([y], factor, order)
    return _reference_shuffle([y], factor, order)


@torch.library.custom_op("revgrad::pixel_unshuffle_split", mutates_args=())
def _pixel_unshuffle_split(x: Tensor, factor: int, order: str) -> tuple[Tensor, Tensor]:
    if _kernel_moves(x):
        first, second = _launch_fold(x, factor, order, groups=2)
    else:
        first, second = _reference_unshuffle(x, factor, order, groups=2)
    return first, second


@torch.library.custom_op("revgrad::pixel_shuffle_concatenate", mutates_args=())
def _pixel_shuffle_concatenate(first: Tensor, second: Tensor, factor: int, order: str) -> Tensor:
    if _kernel_moves(first):
        return _launch_unfold([first, second], factor, order)
    return _reference_shuffle([first, second], factor, order)


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


def _check(operator: str, x: Tensor, order: str) -> None:
    if x.ndim not in (4, 5):
        raise ValueError(f"{operator}: expected [B, C, H, W] or [B, C, T, H, W], got shape {tuple(x.shape)}")
    if order not in _ORDERS:
        raise ValueError(f"{operator}: order must be one of {', '.join(_ORDERS)}, got {order!r}")


def _check_unshuffle(operator: str, x: Tensor, factor: int, order: str) -> None:
    _check(operator, x, order)
    *_, height, width = x.shape
    if factor < 1 or height % factor or width % factor:
        raise ValueError(
            f"{operator}: {height} x {width} pixels cannot be folded by {factor}; "
            "pad or resize the frames to a multiple of the factor"
        )


def _check_shuffle(operator: str, y: Tensor, factor: int, order: str, groups: int = 1) -> None:
    _check(operator, y, order)
    channels = groups * y.shape[1]
    if factor < 1 or channels % factor**2:
        raise ValueError(f"{operator}: {channels} channels are not a multiple of {factor} x {factor}")
