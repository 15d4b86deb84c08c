"""Convolutions on a CPU by the way that is fastest for each, where PyTorch's own choice is not.

PyTorch does not give a batch of 1 to oneDNN, whose code is twice to four times as fast. oneDNN has slow code for the
gradients of some convolutions: of the input with few channels, of the weight with few channels, and without AVX-512 of
every weight.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from revgrad_kernels.backend import observed
from torch import Tensor, nn
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

from crevnet.banded_cpu import banded_weight_gradient
from crevnet.winograd_cpu import direct_weight_gradient, winograd_weight_gradient

_OfWeight = Literal["pytorch", "direct", "winograd", "banded"]
_WEIGHT_GRADIENTS = {
    "direct": direct_weight_gradient,
    "winograd": winograd_weight_gradient,
    "banded": banded_weight_gradient,
}
_ONES = {n: (1,) * n for n in (1, 2, 3)}
_onednn: Any = torch.mkldnn_convolution
_onednn_transposed: Any = getattr(torch.ops.mkldnn, "_convolution_transpose_pointwise", None)
_FLIPPED_CHUNK = 16
"""Samples at a time: oneDNN lays out 16 channels where there are few, and large temporary tensors cost more than small
ones."""


class _Ways(NamedTuple):
    """How output and gradients are found."""

    onednn: bool = False
    """Give it to oneDNN, which PyTorch does not do with a batch of 1."""
    flipped: bool = False
    """Find the input's gradient by a convolution with the weight turned round."""
    weight: _OfWeight = "pytorch"
    """How the weight's gradient is found."""


@lru_cache(256)
def _ways(x: torch.Size, weight: torch.Size, wide: bool) -> _Ways:
    """Which ways are the faster ones.

    The limits are where the ways cross in the convolutions of the paper's model, at batches of 1, 4, 16 and 64, on one
    thread of an AMD EPYC with AVX-512, and with AVX-512 turned off.

    Args:
        x: Shape of the input.
        weight: Shape of the weight.
        wide: Whether there is AVX-512.
    """
    batch, pixels, taps = x[0], math.prod(x[2:]), math.prod(weight[2:])
    (outputs, inputs), most = weight[:2], max(weight[:2])
    if taps == 1 or not batch * pixels:
        return _Ways()
    small = inputs * pixels * taps <= 2**21  # 8 MiB, gathered
    return _Ways(
        onednn=batch == 1 and inputs >= 8 and small,
        flipped=batch >= 4 and (min(weight[:2]) <= 2 or (most <= 8 and (wide or outputs <= 4))),
        weight=_way_of_weight(x, weight, wide) if small else "pytorch",
    )


def _way_of_weight(x: torch.Size, weight: torch.Size, wide: bool) -> _OfWeight:
    """oneDNN is half as fast as a matrix product without AVX-512, and with it where channels do not suit its code."""
    batch, (outputs, inputs), (height, width) = x[0], weight[:2], x[-2:]
    least, most = min(outputs, inputs), max(outputs, inputs)
    if inputs >= 32 and batch < (2 if wide else 4):
        return "direct"
    if weight[-2:] != (3, 3):
        return "pytorch"
    if most <= 8:
        row = math.prod(x[2:]) // height * most
        slow = inputs >= outputs if least > 2 else not wide
        if slow and batch >= 16 and row <= 384:
            return "banded"
        return "direct" if inputs == 8 else "pytorch"
    many = batch >= 16 and inputs * outputs >= 64 * 96 if wide else batch >= 4 and least >= 16
    return "winograd" if many and min(height, width) >= 4 else "pytorch"


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
    ways = _ways(x.shape, weight.shape, _wide())
    if ways == _Ways():
        return None
    return _Convolution.apply(x, weight, bias, ways) if torch.is_grad_enabled() else _output(x, weight, bias, ways)


def _wide() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


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
        parts = [_onednn(part, flipped, None, padding, ones, ones, 1) for part in grad.split(_FLIPPED_CHUNK)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    if ways.onednn and _onednn_transposed is not None:
        none = [0] * len(ones)
        return _onednn_transposed(grad, weight, None, padding, none, ones, ones, 1, "none", [], "")
    return _by_pytorch(grad, x, weight, True, False)[0]


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, ways: _Ways) -> Tensor | None:
    if ways.weight == "pytorch":
        return _by_pytorch(grad, x, weight, False, True)[1]
    kernel = tuple(weight.shape[2:])
    if x.ndim == 4:
        x, grad, kernel = x.unsqueeze(2), grad.unsqueeze(2), (1, *kernel)
    found = _WEIGHT_GRADIENTS[ways.weight](x, grad, kernel)
    return found.view_as(weight)


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
