"""The gradient of the weight of a convolution of few channels on a CPU: over time and width one product with a banded
matrix, over height minimal filtering.

A matrix product needs long rows, and a handful of channels are short ones. A row of the image in all frames and
channels is a long one: the convolution is then over height alone, with a banded matrix for each of three weights. That
is seven times the multiplications for three frames of 32 pixels, at a far higher rate.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from crevnet.scratch import begin

_CHUNK = 16
"""Samples at a time, so that what is between input and output stays in a cache: a few MiB."""
_FILTER = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
"""F(2, 3) of Lavin and Gray 2016: two outputs of three weights by four products instead of six."""


def banded_weight_gradient(x: Tensor, grad: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The gradient of the weight.

    Args:
        x: Input, `[B, inputs, T, H, W]`.
        grad: Gradient of the output, `[B, outputs, T, H, W]`.
        kernel: Sizes of the weight, `(k, 3, k')`.

    Returns:
        `[outputs, inputs, k, 3, k']`.
    """
    (inputs, frames, _, width), outputs = x.shape[1:], grad.shape[1]
    total = x.new_zeros(4, inputs * frames * width, outputs * frames * width)
    shared, of_x, of_grad = _scratch(3, x, grad)
    for part, pulled in zip(x.split(_CHUNK), grad.split(_CHUNK), strict=True):
        read = _of_input(part, shared, of_x)
        written = _of_gradient(pulled, shared, of_grad)
        torch.baddbmm(total, read.flatten(1, 2).transpose(1, 2), written.flatten(1, 2), out=total)
    bands = total.view(4, inputs, frames, width, outputs, frames, width)
    filtered = x.new_zeros(4, inputs, outputs, kernel[0], kernel[2])
    for i, j, band in _diagonals(bands, kernel):
        torch.sum(band, (-2, -1), out=filtered[..., i, j])
    found = x.new_tensor(_FILTER).t() @ filtered.view(4, -1)
    return found.view(3, inputs, outputs, kernel[0], kernel[2]).permute(2, 1, 3, 0, 4).contiguous()


def _scratch(number: int, *tensors: Tensor) -> Tensor:
    """Flat buffers, each for four factors or products of every two rows of a chunk."""
    rows = max(t[:_CHUNK, :, :, 0].numel() for t in tensors)
    return tensors[0].new_empty(number, 2 * (tensors[0].shape[3] + 1) * rows)


def _rows(x: Tensor, outside: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Even and odd rows of the image, with so many of zeros around: `[rows / 2, B, channels * T * W]` each."""
    batch, channels, frames, height, width = x.shape
    rows = begin(buffer, height + height % 2 + 2 * outside, batch, channels, frames, width)
    rows[:outside] = 0
    rows[outside : outside + height] = x.permute(3, 0, 1, 2, 4)
    rows[outside + height :] = 0
    return rows.flatten(2)[::2], rows.flatten(2)[1::2]


def _of_input(x: Tensor, buffer: Tensor, into: Tensor) -> Tensor:
    """Four factors for every two rows of the output: `[4, rows / 2, B, inputs * T * W]`."""
    even, odd = _rows(x, 1, buffer)
    factors = begin(into, 4, len(even) - 1, *even.shape[1:])
    torch.sub(even[:-1], even[1:], out=factors[0])
    torch.add(odd[:-1], even[1:], out=factors[1])
    torch.sub(even[1:], odd[:-1], out=factors[2])
    torch.sub(odd[:-1], odd[1:], out=factors[3])
    return factors


def _of_gradient(grad: Tensor, buffer: Tensor, into: Tensor) -> Tensor:
    """The other four: `[4, rows / 2, B, outputs * T * W]`."""
    even, odd = _rows(grad, 0, buffer)
    factors = begin(into, 4, *even.shape)
    factors[0] = even
    torch.add(even, odd, out=factors[1])
    torch.sub(even, odd, out=factors[2])
    torch.neg(odd, out=factors[3])
    return factors


def _diagonals(bands: Tensor, kernel: tuple[int, ...]) -> Iterator[tuple[int, int, Tensor]]:
    """For every tap over time and width the elements that hold its weight, `[4, inputs, outputs, ., .]`."""
    for i, j in itertools.product(range(kernel[0]), range(kernel[2])):
        later, right = i - kernel[0] // 2, j - kernel[2] // 2
        if abs(later) < bands.shape[2] and abs(right) < bands.shape[3]:
            yield i, j, bands.diagonal(-later, 2, 5).diagonal(-right, 2, 4)
