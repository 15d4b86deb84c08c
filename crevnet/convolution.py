"""Convolution and normalisation layers for two and three dimensions."""

from typing import Literal

from torch import nn

Normalisation = Literal["batch", "group", "none"]


def convolution(dimensions: int, inputs: int, outputs: int, kernel_size: int = 3, *, bias: bool = True) -> nn.Module:
    """A convolution that keeps the size: `[B, inputs, (T,) H, W]` to `[B, outputs, (T,) H, W]`."""
    kind = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    return kind(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias)


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
