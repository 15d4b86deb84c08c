"""ConvLSTM (Shi et al. 2015, "Convolutional LSTM Network"), stacked, as a next-frame predictor."""

from dataclasses import dataclass
from typing import Literal

import torch
from revgrad_kernels import cell_update, hidden_output
from torch import Tensor, nn

from crevnet.baselines.frame_config import FrameConfig, check_layers
from crevnet.convolution import convolution
from crevnet.video_model import RecurrentModel

ConvLSTMState = tuple[tuple[Tensor, Tensor], ...]


@dataclass(kw_only=True)
class ConvLSTMConfig(FrameConfig):
    """Configuration of a stacked ConvLSTM. With `patch=1` a frame takes the 107.4 GFLOPs of table 1.

    Raises:
        ValueError: No layers, a layer without channels, an even kernel, or as in `FrameConfig`.
    """

    name: Literal["convlstm"] = "convlstm"
    """Which model this is."""
    hidden: tuple[int, ...] = (128, 128, 128, 128)
    """Channels of the states of each layer; the folded frame is embedded into as many as the first layer has."""
    kernel_size: int = 5
    """Odd size of the convolutions of all gates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.hidden, self.kernel_size)

    def build(self) -> "ConvLSTM":
        """The model, with random weights and closed peepholes."""
        return ConvLSTM(self)


class PeepholeConvLSTMCell(nn.Module):
    """ConvLSTM with all three peepholes, equation 3 of Shi et al. (`crevnet.cells.ConvLSTMCell` has only `Wco`).

    With `*` for convolution and products of tensors elementwise::

        i = sigmoid(Wxi * x + Whi * h + Wci c + bi)
        f = sigmoid(Wxf * x + Whf * h + Wcf c + bf)
        c' = f c + i tanh(Wxc * x + Whc * h + bc)
        o = sigmoid(Wxo * x + Who * h + Wco c' + bo)
        h' = o tanh(c')

    Args:
        inputs: Channels of x.
        channels: C, of hidden and cell state.
        size: Height and width of the feature map: the peepholes have one weight per element.
        kernel_size: Odd size of the convolutions.

    Attributes:
        gates: The convolutions of i, f, c and o over x and h, in this order.
        peepholes: Wci, Wcf and Wco, `[3, C, H, W]`; zero at first.
    """

    def __init__(self, inputs: int, channels: int, size: tuple[int, int], kernel_size: int) -> None:
        super().__init__()
        self.gates = convolution(2, inputs + channels, 4 * channels, kernel_size)
        self.peepholes = nn.Parameter(torch.zeros(3, channels, *size))

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: the new hidden and cell state.

        Args:
            x: `[B, inputs, H, W]`.
            hidden: `[B, C, H, W]`.
            cell: `[B, C, H, W]`.
        """
        n = cell.shape[1]
        i, f, g, o = self.gates(torch.cat([x, hidden], dim=1)).split(n, dim=1)
        w_ci, w_cf, w_co = self.peepholes
        cell = cell_update(torch.cat([i + w_ci * cell, f + w_cf * cell, g], dim=1), cell)
        return hidden_output(o + w_co * cell, cell), cell


class ConvLSTM(RecurrentModel):
    """Stacked ConvLSTM between a 1x1 convolution from the folded frame and one back to it.

    The state holds the hidden and the cell state of each layer, `[B, hidden[l], H, W]` both.

    Attributes:
        embedding: Folded frame to `hidden[0]` channels.
        cells: The layers; each reads the hidden state of the one below.
        output: Hidden state of the last layer to the folded prediction.
    """

    def __init__(self, config: ConvLSTMConfig) -> None:
        super().__init__(config)
        self.config: ConvLSTMConfig = config
        inputs = (config.hidden[0], *config.hidden[:-1])
        self.embedding = convolution(2, config.folded_channels, config.hidden[0], 1)
        self.cells = nn.ModuleList(
            PeepholeConvLSTMCell(i, channels, config.folded_size, config.kernel_size)
            for i, channels in zip(inputs, config.hidden, strict=True)
        )
        self.output = convolution(2, config.hidden[-1], config.folded_channels, 1)

    def initial_state(self, like: Tensor) -> ConvLSTMState:
        """Zero states for a batch of frames."""
        zeros = [like.new_zeros(like.shape[0], c, *self.config.folded_size) for c in self.config.hidden]
        return tuple((z, z) for z in zeros)

    def step(self, clip: Tensor, state: ConvLSTMState) -> tuple[Tensor, ConvLSTMState]:
        """One time step: the predicted frame and the new state.

        Args:
            clip: A frame, `[B, channels, H, W]`.
            state: As described above.
        """
        x = self.embedding(self.config.fold(clip))
        states = []
        for cell, (hidden, memory) in zip(self.cells, state, strict=True):
            x, memory = cell(x, hidden, memory)
            states.append((x, memory))
        return self.config.unfold(self.output(x)), tuple(states)
