"""Convolution and normalisation layers for two and three dimensions."""

from typing import Literal

import torch
from revgrad_kernels.backend import uses_triton
from torch import Tensor, nn
from torch.nn import functional as F

from crevnet import convolution_cpu

Normalisation = Literal["batch", "group", "none"]


class Convolution2d(nn.Conv2d):
    """`nn.Conv2d` that keeps the size of its input; on a CPU by the fastest way."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 3, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, kernel_size, padding=_half(kernel_size), bias=bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """`[B, inputs, H, W]` to `[B, outputs, H, W]`."""
        found = convolution_cpu.convolve(input, self.weight, self.bias)
        return super().forward(input) if found is None else found


class Convolution3d(nn.Conv3d):
    """`nn.Conv3d` that keeps the size of its input; on a CPU by the fastest way."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 3, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, kernel_size, padding=_half(kernel_size), bias=bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """`[B, inputs, T, H, W]` to `[B, outputs, T, H, W]`."""
        found = convolution_cpu.convolve(input, self.weight, self.bias)
        return super().forward(input) if found is None else found

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        # oneDNN 3.12 gets a weight's gradient in bfloat16 wrong, up to NaN, where the kernel is deeper than the input,
        # unless that is flat. So the zeros around it are made part of it.
        if input.is_cpu and 1 < input.shape[-3] < weight.shape[-3] and _in_bfloat16(input):
            (depth, *rest) = (n // 2 for n in self.kernel_size)
            return F.conv3d(F.pad(input, (0, 0, 0, 0, depth, depth)), weight, bias, padding=(0, *rest))
        return super()._conv_forward(input, weight, bias)


Convolution = Convolution2d | Convolution3d


def convolution(dimensions: int, inputs: int, outputs: int, kernel_size: int = 3, *, bias: bool = True) -> Convolution:
    """A convolution that keeps the size: `[B, inputs, (T,) H, W]` to `[B, outputs, (T,) H, W]`."""
    kinds: dict[int, type[Convolution]] = {2: Convolution2d, 3: Convolution3d}
    return kinds[dimensions](inputs, outputs, kernel_size, bias=bias)


def check_odd(option: str, *sizes: int) -> None:
    """Raise unless kernel sizes are odd: one of even size has no centre.

    Args:
        option: The option of `model` that names them.
        sizes: The sizes.

    Raises:
        ValueError: One is not.
    """
    if any(size < 1 or size % 2 == 0 for size in sizes):
        raise ValueError(f"model.{option} must be odd, got {', '.join(map(str, sizes))}")


def _half(kernel_size: int) -> int:
    """The zeros on each side with which the size is kept."""
    if kernel_size % 2 == 0:
        raise ValueError(f"a convolution that keeps the size needs an odd kernel_size, got {kernel_size}")
    return kernel_size // 2


def _in_bfloat16(x: Tensor) -> bool:
    """Whether a convolution of a tensor on a CPU is one in bfloat16."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") is torch.bfloat16
    return x.dtype is torch.bfloat16


def convolve(layer: Convolution, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output of a convolution, and the bias that it leaves to the kernel that reads the output.

    On a GPU a bias takes a pass over the output of its own. Where no kernel is used the bias is in the output, and None
    is returned for it: on a CPU adding it costs nothing. So it is too where calling the layer does more than convolve:
    it has hooks (pruning, spectral norm, profilers), or it is of another class.
    """
    if layer.bias is None or not uses_triton("auto", x) or not _only_convolves(layer):
        return layer(x), None
    function = F.conv2d if isinstance(layer, nn.Conv2d) else F.conv3d
    return function(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups), layer.bias


def _only_convolves(layer: Convolution) -> bool:
    """Whether calling a layer is its convolution and nothing else. A parametrised layer is of a class of its own."""
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    return type(layer) in (Convolution2d, Convolution3d) and not any(hooks)


def normalisation(dimensions: int, channels: int, kind: Normalisation) -> nn.Module:
    """A normalisation layer over `[B, channels, (T,) H, W]`.

    Groups hold 16 channels: more where the channels do not divide into such groups, all of them where there are fewer.
    """
    if kind == "batch":
        return {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimensions](channels)
    if kind == "group":
        groups = next(g for g in range(max(1, channels // 16), 0, -1) if channels % g == 0)
        return nn.GroupNorm(groups, channels)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"normalisation must be 'batch', 'group' or 'none', got {kind!r}")


def use_channels_last(model: nn.Module) -> None:
    """Lay the weights of convolutions out so that oneDNN and cuDNN pick kernels that need no reordering."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        elif isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
