"""Convolutions on a CPU by the way that is fastest for each, where PyTorch's own choice is not.

PyTorch does not give a batch of 1 to oneDNN, whose code is twice to four times as fast, and oneDNN finds the gradient
of a weight at half the rate of a matrix product. Here it is one matrix product per sample: the pixels that the weights
read are gathered, as whole rows of channels, which takes a twentieth of the time.
"""

import itertools
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from revgrad_kernels.backend import observed
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

_ONES = {n: (1,) * n for n in (1, 2, 3)}
_onednn: Any = torch.mkldnn_convolution
_onednn_transposed: Any = getattr(torch.ops.mkldnn, "_convolution_transpose_pointwise", None)


class _Ways(NamedTuple):
    """Which of the ways that are not PyTorch's are the faster ones."""

    onednn: bool
    """Give it to oneDNN, which PyTorch does not do with a batch of 1."""
    flipped: bool
    """Find the input's gradient by a convolution with the weight turned round: where there are hardly any channels."""
    gathered: bool
    """Find the weight's gradient by gathering: not for rows of few channels, which cost as much as long ones."""


@lru_cache(256)
def _ways(x: torch.Size, weight: torch.Size) -> _Ways:
    batch, pixels = x[0], math.prod(x[2:])
    (outputs, inputs), taps = weight[:2], math.prod(weight[2:])
    if taps == 1 or not batch * pixels:
        return _Ways(onednn=False, flipped=False, gathered=False)
    gathered = inputs >= 8 and pixels * taps * inputs <= 2**21  # 8 MiB
    return _Ways(
        onednn=batch == 1 and gathered,
        flipped=batch >= 4 and min(inputs, outputs) <= 2,
        gathered=gathered,
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Convolution of odd size and stride 1, with zeros around the input, whose size it keeps.

    Args:
        x: `[B, inputs, (T,) H, W]`.
        weight: `[outputs, inputs, (k,) k, k]`.
        bias: `[outputs]`, or None.

    Returns:
        `[B, outputs, (T,) H, W]`; None where it is not for this code, because PyTorch's own way is faster, the tensors
        are not in float32 on a CPU, or somebody needs PyTorch's graph (compilers, transforms, fake tensors, autocast).
    """
    if not (x.is_cpu and x.dtype is torch.float32 and weight.dtype is torch.float32 and x.ndim == weight.ndim):
        return None
    if type(x) is not Tensor or type(weight) not in (Tensor, nn.Parameter) or x.shape[1] != weight.shape[1]:
        return None
    if observed() or torch.is_autocast_enabled("cpu"):
        return None
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    ways = _ways(x.shape, weight.shape)
    if not any(ways):
        return None
    return _Convolution.apply(x, weight, bias, ways) if torch.is_grad_enabled() else _output(x, weight, bias, ways)


class _Convolution(torch.autograd.Function):
    """Saves input and weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ways: _Ways) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ways = ways
        return _output(x, weight, bias, ways)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        grad_bias = grad.sum((0, *range(2, grad.ndim))) if of_bias else None
        if torch.is_grad_enabled():  # create_graph=True
            grad_x, grad_weight, _ = _by_pytorch(grad, x, weight, of_x, of_weight)
            return grad_x, grad_weight, grad_bias, None
        return (
            _input_gradient(grad, x, weight, ctx.ways) if of_x else None,
            _weight_gradient(grad, x, weight, ctx.ways) if of_weight else None,
            grad_bias,
            None,
        )


def _padding(weight: Tensor) -> list[int]:
    return [k // 2 for k in weight.shape[2:]]


def _output(x: Tensor, weight: Tensor, bias: Tensor | None, ways: _Ways) -> Tensor:
    ones = _ONES[x.ndim - 2]
    if ways.onednn:
        return _onednn(x, weight, bias, _padding(weight), ones, ones, 1)
    return torch.convolution(x, weight, bias, ones, _padding(weight), ones, False, (0,) * len(ones), 1)


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, ways: _Ways) -> Tensor | None:
    ones, padding = _ONES[x.ndim - 2], _padding(weight)
    if ways.flipped:
        flipped = weight.flip(*range(2, weight.ndim)).transpose(0, 1).contiguous()
        return _onednn(grad, flipped, None, padding, ones, ones, 1)
    if ways.onednn and _onednn_transposed is not None:
        none = [0] * len(ones)
        return _onednn_transposed(grad, weight, None, padding, none, ones, ones, 1, "none", [], "")
    return _by_pytorch(grad, x, weight, True, False)[0]


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, ways: _Ways) -> Tensor | None:
    if not ways.gathered:
        return _by_pytorch(grad, x, weight, False, True)[1]
    size, (outputs, inputs, *kernel) = x.shape[2:], weight.shape
    pixels, taps = math.prod(size), math.prod(kernel)
    places = _places(size, tuple(kernel))
    rows = x.new_zeros(pixels + 1, inputs)  # the last one is what lies outside
    gathered = x.new_empty(pixels * taps, inputs)
    total = x.new_empty(outputs, taps * inputs)
    for i, (sample, pulled) in enumerate(zip(x, grad, strict=True)):
        rows[:-1].copy_(sample.reshape(inputs, pixels).t())
        torch.index_select(rows, 0, places, out=gathered)
        torch.addmm(total, pulled.reshape(outputs, pixels), gathered.view(pixels, -1), beta=min(i, 1), out=total)
    return total.view(outputs, taps, inputs).transpose(1, 2).reshape(weight.shape)


@lru_cache(32)
def _places(size: tuple[int, ...], kernel: tuple[int, ...]) -> Tensor:
    """For every pixel in turn the pixels that a kernel reads; one outside has the number behind the last."""
    with torch.inference_mode(False), _disable_current_modes():  # they serve outside as well
        grid = torch.meshgrid(*(torch.arange(n, device="cpu") for n in size), indexing="ij")
        outside = torch.full_like(grid[0], math.prod(size))
        found = []
        for tap in itertools.product(*map(range, kernel)):
            place, inside = torch.zeros_like(outside), torch.ones_like(outside, dtype=torch.bool)
            for here, offset, k, n in zip(grid, tap, kernel, size, strict=True):
                there = here + offset - k // 2
                place = place * n + there
                inside &= (there >= 0) & (there < n)
            found.append(place.where(inside, outside).flatten())
        return torch.stack(found, 1).flatten().int()


def _by_pytorch(grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> tuple[Tensor | None, ...]:
    ones = _ONES[x.ndim - 2]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, ones, _padding(weight), ones, False, (0,) * len(ones), 1, (of_x, of_weight, False)
    )


def _flops(transposed: bool) -> Callable[..., int]:
    def count(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return conv_flop_count(x, weight, out_shape, transposed=transposed)

    return count


for _operator, _transposed in ((torch.ops.aten.mkldnn_convolution, False), (_onednn_transposed, True)):
    # What PyTorch's counter of FLOPs does not know.
    if _operator is not None and _operator not in flop_registry:
        register_flop_formula([_operator])(_flops(_transposed))
