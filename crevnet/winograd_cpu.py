"""The gradient of a convolution's weight on a CPU as a few large matrix products: direct, or by minimal filtering.

Both gather the pixels that the weights read as rows of channels, and both leave out the products with the zeros before
the first frame and behind the last one: of three frames 2 of 9.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from crevnet.scratch import begin

_TILE = (2, 4)
"""Height and width of a tile. 2 x 2 takes a third more arithmetic and up to a fifth more time; 4 x 4 a quarter less
arithmetic, no less time, and its errors are twice as large."""
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 5 / 8, -5 / 8, 8 / 5, -8 / 5)}
"""Where the polynomials of a tile are evaluated, beside infinity. For 4 those of small errors; those of the textbooks,
0, 1, -1, 2 and -2, have twice as large ones."""
_SCRATCH = 2**20
"""Floats that a chunk of samples takes at most: 4 MiB, which stay in a cache."""


def direct_weight_gradient(x: Tensor, grad: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """One sample after the other.

    Args:
        x: Input, `[B, inputs, T, H, W]`.
        grad: Gradient of the output, `[B, outputs, T, H, W]`.
        kernel: Its three odd sizes, T first.

    Returns:
        `[outputs, inputs, *kernel]`, in the order of the products: to add it in that order costs less than a copy.
    """
    (inputs, *size), outputs = x.shape[1:], grad.shape[1]
    pixels, frame, taps = math.prod(size), math.prod(size[1:]), math.prod(kernel[1:])
    places = _places(1, tuple(size), (1, 1), kernel[1:], (kernel[1] // 2, kernel[2] // 2)).flatten()
    rows, gathered = x.new_empty((pixels + 1) * inputs), x.new_empty(pixels * taps, inputs)
    total = x.new_zeros(outputs, kernel[0], taps * inputs)
    for sample, pulled in zip(x.split(1), grad.reshape(len(x), outputs, -1), strict=True):
        torch.index_select(_rows(sample, rows), 0, places, out=gathered)
        for tap, read, written in _frames(kernel[0], size[0]):
            here, there = (slice(frames.start * frame, frames.stop * frame) for frames in (written, read))
            sums = total[:, tap]
            torch.addmm(sums, pulled[:, here], gathered.view(pixels, -1)[there], out=sums)
    return total.view(outputs, *kernel, inputs).movedim(-1, 1)


def winograd_weight_gradient(x: Tensor, grad: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Winograd's minimal filtering (Lavin and Gray 2016) over height and width, with a third of the multiplications.

    An output is `A (G w * B x)` with a tile x of the input, so that with a gradient g of the output that of w is
    `G' (A' g * B x)`, summed over tiles.

    Args:
        x: Input, `[B, inputs, T, H, W]`.
        grad: Gradient of the output, `[B, outputs, T, H, W]`.
        kernel: Its three sizes, `(k, 3, 3)`, k odd.

    Returns:
        `[outputs, inputs, k, 3, 3]`, in the order of the products.
    """
    (inputs, *size), outputs = x.shape[1:], grad.shape[1]
    of_output, of_weight, of_input = _transforms()
    products = len(of_input)
    tiles = size[0] * math.prod(-(-n // m) for n, m in zip(size[1:], _TILE, strict=True))
    chunk = max(1, min(len(x), _SCRATCH // (3 * products * tiles * max(inputs, outputs))))
    scratch = x.new_empty(3, products * chunk * tiles * max(inputs, outputs))
    total = x.new_zeros(kernel[0], products, outputs, inputs)
    for part, pulled in zip(x.split(chunk), grad.split(chunk), strict=True):
        tiles_of_x = _transformed(part, of_input, (_TILE[0] + 2, _TILE[1] + 2), 1, scratch[:2])
        tiles_of_grad = _transformed(pulled, of_output, _TILE, 0, scratch[::2])
        for tap, read, written in _frames(kernel[0], size[0]):
            left, right = tiles_of_grad[:, written].flatten(1, 2), tiles_of_x[:, read].flatten(1, 2)
            torch.baddbmm(total[tap], left.transpose(1, 2), right, out=total[tap])
    found = torch.stack([of_weight.t() @ of_tap.view(products, -1) for of_tap in total])
    return found.view(*kernel, outputs, inputs).permute(3, 4, 0, 1, 2)


def _frames(taps: int, frames: int) -> Iterator[tuple[int, slice, slice]]:
    """For every tap over time the frames that it reads, and those that it writes."""
    for tap in range(taps):
        later = tap - taps // 2
        first, last = max(0, -later), min(frames, frames - later)
        if first < last:
            yield tap, slice(first + later, last + later), slice(first, last)


def _transformed(x: Tensor, transform: Tensor, window: tuple[int, int], before: int, scratch: Tensor) -> Tensor:
    """Factors of the products of every tile, `[products, T, B * tiles, channels]`, in the second half of scratch."""
    places = _places(len(x), tuple(x.shape[2:]), _TILE, window, (before, before)).permute(4, 5, 1, 0, 2, 3).flatten()
    products, channels = len(transform), x.shape[1]
    gathered = begin(scratch[0], len(places), channels)
    torch.index_select(_rows(x, scratch[1]), 0, places, out=gathered)  # the rows are read before they are overwritten
    factors = begin(scratch[1], products, gathered.numel() // transform.shape[1])
    return torch.mm(transform, gathered.view(transform.shape[1], -1), out=factors).view(
        products, x.shape[2], -1, channels
    )


def _rows(x: Tensor, buffer: Tensor) -> Tensor:
    """The pixels of all samples, `[B * T * H * W + 1, channels]`; the last row is what lies outside."""
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    rows = begin(buffer, len(x) * pixels + 1, channels)
    rows[-1] = 0
    for sample, into in zip(x.reshape(len(x), channels, pixels), rows[:-1].split(pixels), strict=True):
        into.copy_(sample.t())  # one by one: PyTorch has fast code for a matrix
    return rows


@lru_cache(64)
def _places(
    batch: int, size: tuple[int, ...], step: tuple[int, int], window: tuple[int, ...], before: tuple[int, int]
) -> Tensor:
    """Rows of pixels (see `_rows`) that lie in windows: `[B, T, windows, windows, *window]`, over height and width."""
    frames, height, width = size
    with torch.inference_mode(False), _disable_current_modes():  # they serve outside as well
        y, x = (
            torch.arange(0, n, s, device="cpu")[:, None] + torch.arange(w, device="cpu") - b
            for n, s, w, b in zip(size[1:], step, window, before, strict=True)
        )
        y, x = y[:, None, :, None], x[None, :, None, :]
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        first = torch.arange(0, batch * frames * height * width, height * width, device="cpu")
        rows = first.view(batch, frames, 1, 1, 1, 1) + y * width + x
        return rows.where(inside, torch.tensor(batch * frames * height * width)).int()


@lru_cache(1)
def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """A', G and B, from a tile, the weights, and the window that a tile reads: `[products, their pixels]`."""
    with torch.inference_mode(False), _disable_current_modes():
        of_height, of_width = (_of_one_axis(m, _POINTS[m]) for m in _TILE)
        output, weight, read = (torch.kron(a, b).float() for a, b in zip(of_height, of_width, strict=True))
        return output.t().contiguous(), weight, read


def _of_one_axis(outputs: int, points: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The transposed Toom-Cook algorithm.

    The coefficients of a product of polynomials are `inv(V) (V' a * V" b)`, where the V evaluate at the points and at
    infinity. Filtering is the transpose with respect to one factor.
    """

    def evaluate(coefficients: int) -> Tensor:
        rows = [[p**k for k in range(coefficients)] for p in points]
        return torch.tensor([*rows, [0.0] * (coefficients - 1) + [1.0]], dtype=torch.float64, device="cpu")

    return evaluate(outputs).t(), evaluate(3), torch.linalg.inv(evaluate(len(points) + 1)).t()
