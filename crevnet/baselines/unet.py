"""UNet (Ronneberger et al. 2015), which takes the place of the two-way autoencoder in Table 2.

As there: stages of two 3 x 3 convolutions with ReLU, 2 x 2 max pooling after which channels double, 2 x 2 transposed
convolutions that halve them, skip connections by concatenation, a last 1 x 1 convolution, and He's initial weights.
Chosen here: convolutions are padded, so that maps keep their size and nothing is cropped; no dropout; the last
convolution, which no ReLU follows, starts smaller, with PyTorch's initial weights; in 3D every kernel is as deep as
wide but only space is pooled, as the two-way autoencoder folds only space.
"""

from typing import Any

import torch
from torch import Tensor, nn

from crevnet.convolution import convolution


class UNet(nn.Module):
    """Encoder and decoder of a UNet, apart, so that something can be put between them.

    Args:
        channels: C, of the frames.
        dimensions: 3 for clips with time as a dimension, 2 for frames.
        width: Channels of the first stage.
        stages: How often height and width are halved; the features then have `width * 2**stages` channels.
    """

    def __init__(self, channels: int, dimensions: int, *, width: int, stages: int) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(stages + 1)]
        fold = (2, 2) if dimensions == 2 else (1, 2, 2)
        transposed: Any = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dimensions]
        self.pool = {2: nn.MaxPool2d, 3: nn.MaxPool3d}[dimensions](fold)
        self.down = nn.ModuleList(
            two_convolutions(dimensions, inputs, outputs)
            for inputs, outputs in zip([channels, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(transposed(2 * w, w, fold, stride=fold) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(two_convolutions(dimensions, 2 * w, w) for w in reversed(widths[:-1]))
        self.head = convolution(dimensions, width, channels, 1)
        for part in (self.down, self.up, self.merge):
            part.apply(_initialise)

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The contracting path.

        Args:
            x: `[B, C, (T,) H, W]`.

        Returns:
            Features `[B, width * 2**stages, (T,) H / 2**stages, W / 2**stages]`, and per stage, from the finest, what
            its skip connection hands to the decoder.
        """
        skips: list[Tensor] = []
        for stage in self.down:
            if stage is not self.down[0]:
                skips.append(x)
                x = self.pool(x)
            x = stage(x)
        return x, skips

    def decode(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        """The expansive path: features and skip connections as `encode` returns them, to `[B, C, (T,) H, W]`."""
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = merge(torch.cat([skip, up(x)], dim=1))
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """The plain UNet, with nothing between encoder and decoder: `[B, C, (T,) H, W]` to the same shape."""
        return self.decode(*self.encode(x))


def two_convolutions(dimensions: int, inputs: int, outputs: int) -> nn.Sequential:
    """Two 3 x 3 (x 3) convolutions, each with a ReLU: `[B, inputs, (T,) H, W]` to `[B, outputs, (T,) H, W]`."""
    return nn.Sequential(
        convolution(dimensions, inputs, outputs),
        nn.ReLU(),
        convolution(dimensions, outputs, outputs),
        nn.ReLU(),
    )


def _initialise(module: nn.Module) -> None:
    """Weights from a normal distribution of variance 2 / N for N inputs of a unit."""
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
        # Kernels do not overlap: each output reads one position, all of its channels, which come first in the weight.
        nn.init.normal_(module.weight, std=(2 / module.weight.shape[0]) ** 0.5)
