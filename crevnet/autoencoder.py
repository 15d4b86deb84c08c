"""The two-way autoencoder (section 2.1): an invertible network whose forward pass encodes and whose inverse decodes."""

from collections.abc import Sequence

from torch import nn

from crevnet.convolution import Normalisation, convolution, normalisation
from revgrad import AdditiveCoupling, PixelUnshuffle, ReversibleLayer, ReversibleSequential, Split


def residual_function(
    dimensions: int, channels: int, bottleneck: int, norm: Normalisation, *, first: bool = False
) -> nn.Sequential:
    """F of eq. 2: three convolutions through a bottleneck, each behind normalisation and ReLU.

    The very first one of a network reads the frames as they are.
    """
    inner = max(1, channels // bottleneck)
    widths = [channels, inner, inner, channels]
    layers: list[nn.Module] = []
    for i in range(3):
        if i or not first:
            layers += [normalisation(dimensions, widths[i], norm), nn.ReLU()]
        layers.append(convolution(dimensions, widths[i], widths[i + 1], bias=norm == "none"))
    return nn.Sequential(*layers)


def two_way_autoencoder(
    channels: int,
    dimensions: int,
    *,
    blocks: Sequence[int] = (4, 5, 3),
    bottleneck: int = 2,
    norm: Normalisation = "none",
) -> ReversibleSequential:
    """Build the encoder; its `Inverse` is the decoder.

    Each stage folds 2 x 2 pixels into channels and then couples the two groups in alternation. `blocks=(4, 5, 3)` is
    the paper's 36-layer network (12 blocks of three convolutions): frames `[B, C, (T,) H, W]` become two streams
    `[B, 32 C, (T,) H / 8, W / 8]`.

    Args:
        channels: C, of the frames.
        dimensions: 3 for clips with time as a dimension, 2 for frames.
        blocks: Number of blocks per stage; a stage halves height and width.
        bottleneck: By how much the inner convolutions are narrower.
        norm: Normalisation in front of every convolution but the first; convolutions have a bias only without.
    """
    layers: list[ReversibleLayer] = []
    done = 0
    for stage, count in enumerate(blocks):
        layers.append(PixelUnshuffle(2))
        if stage == 0:
            layers.append(Split(2))
        width = 2 * channels * 4**stage
        for _ in range(count):
            f = residual_function(dimensions, width, bottleneck, norm, first=done == 0)
            layers.append(AdditiveCoupling(f, source=1 - done % 2, target=done % 2))
            done += 1
    return ReversibleSequential(*layers)
