"""The layers of a Video Pixel Network (Kalchbrenner et al. 2016): residual multiplicative blocks, with and without
masks, and the PixelCNN made of them, over a whole frame or pixel by pixel.
"""

from collections.abc import Callable
from typing import Literal

import torch
from revgrad_kernels import cell_update, hidden_output
from torch import Tensor, nn
from torch.nn import functional as F

Apply = Callable[[nn.Module, Tensor], Tensor]


class MaskedConvolution(nn.Conv2d):
    """A convolution that keeps the size and sees of each pixel's neighbours those before it in raster order.

    Channels belong, in equal shares, to the channels of a pixel, which have an order of their own: at the pixel itself
    a channel sees those of the channels of the pixel before its own (mask A) and those of its own as well (mask B).

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        kernel_size: Odd.
        pixel_channels: Channels of a pixel.
        mask: `A` or `B`.
        copies: Outputs are so many groups of channels, each of which is shared out.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel_size: int, pixel_channels: int, mask: Literal["A", "B"], copies: int = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel_size, padding=kernel_size // 2)
        self.seen: Tensor
        of_input = torch.arange(inputs) * pixel_channels // inputs
        per_copy = outputs // copies
        of_output = (torch.arange(per_copy) * pixel_channels // per_copy).repeat(copies)[:, None]
        middle = kernel_size // 2
        seen = torch.zeros_like(self.weight)
        seen[:, :, :middle] = 1
        seen[:, :, middle, :middle] = 1
        seen[:, :, middle, middle] = (of_input < of_output if mask == "A" else of_input <= of_output).to(seen.dtype)
        self.register_buffer("seen", seen, persistent=False)

    def masked_weight(self) -> Tensor:
        """The weights, zero where nothing may be seen."""
        return self.weight * self.seen

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of `[B, inputs, H, W]`, to `[B, outputs, H, W]`."""
        return F.conv2d(x, self.masked_weight(), self.bias, padding=self.padding)


def apply_everywhere(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer on a whole feature map."""
    return layer(x)


class RasterScan:
    """Masked convolutions at one pixel after the other, in raster order: called like `apply_everywhere`, for `x` there.

    Of each layer's input only the rows that can still be seen are kept.

    Args:
        width: Of the feature maps.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.column = 0
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def start_row(self) -> None:
        """Go on to the beginning of the next row."""
        self.column = 0
        for _, rows in self._layers.values():
            # What comes round to the last row, and is not yet overwritten, meets masked weights only.
            rows.copy_(rows.roll(-1, dims=2))

    def keep(self, layer: MaskedConvolution, x: Tensor) -> tuple[Tensor, Tensor]:
        """Remember a layer's input `[B, C, 1, 1]` at this pixel; returns the layer's weights and the rows it sees."""
        radius = layer.kernel_size[0] // 2
        if layer not in self._layers:
            weight = layer.masked_weight()[:, :, : radius + 1].flatten(1)
            self._layers[layer] = weight, x.new_zeros(*x.shape[:2], radius + 1, self.width + 2 * radius)
        weight, rows = self._layers[layer]
        rows[:, :, -1, self.column + radius] = x[:, :, 0, 0]
        return weight, rows

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The output `[B, C', 1, 1]` of a layer at this pixel, given its input `[B, C, 1, 1]` there."""
        assert isinstance(layer, MaskedConvolution)
        weight, rows = self.keep(layer, x)
        window = rows[:, :, :, self.column : self.column + layer.kernel_size[1]]
        return F.linear(window.flatten(1), weight, layer.bias)[:, :, None, None]


class MultiplicativeUnit(nn.Module):
    """`MU(h) = g1 tanh(g2 h + g3 u)` with `g1, g2, g3 = sigmoid(W * h)` and `u = tanh(W4 * h)` (section 4.1).

    Args:
        gates: The convolution of g3, g2, u and g1, in this order: that of an LSTM's gates, of which h is the cell.
    """

    def __init__(self, gates: nn.Module) -> None:
        super().__init__()
        self.gates = gates

    def forward(self, h: Tensor, apply: Apply = apply_everywhere) -> Tensor:
        """`[B, c, H, W]` to the same shape."""
        n = h.shape[1]
        gates, output = apply(self.gates, h).split([3 * n, n], dim=1)
        return hidden_output(output, cell_update(gates, h))


class ResidualMultiplicativeBlock(nn.Module):
    """`RMB(h) = h + W4 * MU(MU(W1 * h))`, `W1` from 2c to c channels and `W4` back, both 1x1 (section 4.2).

    Args:
        width: c.
        kernel_size: Of the multiplicative units.
        dilation: Of the multiplicative units; without masks only.
        pixel_channels: Mask all convolutions for pixels of so many channels; 0 masks none.
    """

    def __init__(self, width: int, kernel_size: int, *, dilation: int = 1, pixel_channels: int = 0) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, size: int, copies: int = 1) -> nn.Module:
            if pixel_channels:
                return MaskedConvolution(inputs, outputs, size, pixel_channels, "B", copies)
            return nn.Conv2d(inputs, outputs, size, padding=dilation * (size // 2), dilation=dilation)

        self.narrow = layer(2 * width, width, 1)
        self.first = MultiplicativeUnit(layer(width, 4 * width, kernel_size, copies=4))
        self.second = MultiplicativeUnit(layer(width, 4 * width, kernel_size, copies=4))
        self.widen = layer(width, 2 * width, 1)

    def forward(self, h: Tensor, apply: Apply = apply_everywhere) -> Tensor:
        """`[B, 2c, H, W]` to the same shape."""
        return h + apply(self.widen, self.second(self.first(apply(self.narrow, h), apply), apply))


class PixelDecoder(nn.Module):
    """PixelCNN: a masked convolution of the frame, plus the context, through masked blocks.

    Args:
        channels: Channels of a pixel.
        width: c.
        blocks: Number of blocks.
        kernel_size: Odd size of the first convolution and of those of the multiplicative units.
    """

    def __init__(self, channels: int, width: int, blocks: int, kernel_size: int) -> None:
        super().__init__()
        self.first = MaskedConvolution(channels, 2 * width, kernel_size, channels, "A")
        self.blocks = nn.ModuleList(
            ResidualMultiplicativeBlock(width, kernel_size, pixel_channels=channels) for _ in range(blocks)
        )
        self.last = MaskedConvolution(2 * width, channels, 1, channels, "B")

    def forward(self, frame: Tensor, context: Tensor, apply: Apply = apply_everywhere) -> Tensor:
        """Logits `[B, channels, H, W]` of a frame, each from what is before it in the frame, and from the context.

        Args:
            frame: `[B, channels, H, W]`.
            context: `[B, 2c, H, W]`.
            apply: How layers are applied: to a whole frame or, where H = W = 1, at a pixel of a `RasterScan`.
        """
        h = apply(self.first, frame) + context
        for block in self.blocks:
            h = block(h, apply)
        return apply(self.last, h)

    @torch.no_grad()
    def generate(self, context: Tensor) -> Tensor:
        """A frame `[B, channels, H, W]` from its context `[B, 2c, H, W]`, pixel by pixel.

        The value of a pixel is its mean, `sigmoid(logit)`, given the values before it.
        """
        height, width = context.shape[2:]
        frame = context.new_zeros(context.shape[0], self.first.in_channels, height, width)
        scan = RasterScan(width)
        for row in range(height):
            scan.start_row()
            for column in range(width):
                scan.column = column
                at = (..., slice(row, row + 1), slice(column, column + 1))
                for channel in range(frame.shape[1]):
                    logits = self(frame[at], context[at], scan)
                    frame[:, channel, row, column] = torch.sigmoid(logits[:, channel, 0, 0])
                # The layers above have seen all that they may of this pixel; the first has not seen its last channel.
                scan.keep(self.first, frame[at])
        return frame
