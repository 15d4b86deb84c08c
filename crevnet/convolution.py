"""Convolution and normalisation layers for two and three dimensions."""

from typing import Literal

from torch import nn

Normalisation = Literal["batch", "group", "none"]


def convolution(dimensions: int, inputs: int, outputs: int, kernel_size: int = 3, *, bias: bool = True) -> nn.Module:
    """A convolution that keeps the size: `[B, inputs, (T,) H, W]` to `[B, outputs, (T,) H, W]`."""
    kind = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    return kind(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias)


def normalisation(dimensions: int, channels: int, kind: Normalisation) -> nn.Module:
    """A normalisation layer over `[B, channels, (T,) H, W]`; groups hold 16 channels, or all if there are fewer."""
    if kind == "batch":
        return {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimensions](channels)
    if kind == "group":
        return nn.GroupNorm(max(1, channels // 16), channels)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"normalisation must be 'batch', 'group' or 'none', got {kind!r}")
