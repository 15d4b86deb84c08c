"""PredRNN (Wang et al. 2017, "PredRNN: Recurrent Neural Networks for Predictive Learning Using Spatiotemporal LSTMs"),
as a next-frame predictor.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from crevnet.baselines.frame_config import FrameConfig, check_layers
from crevnet.cells import STLSTMCell
from crevnet.convolution import convolution
from crevnet.video_model import RecurrentModel

PredRNNState = tuple[tuple[tuple[Tensor, Tensor], ...], Tensor]


@dataclass(kw_only=True)
class PredRNNConfig(FrameConfig):
    """Configuration of a PredRNN. With `patch=1` a frame takes 192.5 GFLOPs, 192.9 in table 1.

    Raises:
        ValueError: No layers, layers of different width, an even kernel, or as in `FrameConfig`.
    """

    name: Literal["predrnn"] = "predrnn"
    """Which model this is."""
    hidden: tuple[int, ...] = (128, 128, 128, 128)
    """Channels of the states of each layer; the same for all, as one memory passes through them."""
    kernel_size: int = 5
    """Odd size of the convolutions of all gates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.hidden, self.kernel_size)
        if len(set(self.hidden)) > 1:
            raise ValueError(
                f"model.hidden must be the same for all layers, through which one memory passes, got {self.hidden}"
            )

    def build(self) -> "PredRNN":
        """The model, with random weights."""
        return PredRNN(self)


class FirstSTLSTMCell(STLSTMCell):
    """The ST-LSTM of the first layer, whose input, a folded frame, has its own number of channels.

    Args:
        inputs: Channels of the input.
        channels: Channels of the states.
        size: Size of the feature map; only its number of dimensions matters.
        kernel_size: Odd size of all gate convolutions.
    """

    def __init__(self, inputs: int, channels: int, size: tuple[int, ...], kernel_size: int) -> None:
        super().__init__(channels, size, kernel_size)
        self.cell_gates = convolution(len(size), inputs + channels, 4 * channels, kernel_size)
        self.memory_gates = convolution(len(size), inputs + channels, 3 * channels, kernel_size)


class PredRNN(RecurrentModel):
    """Stacked ST-LSTM with a memory M in zigzag, and a 1x1 convolution back to the folded frame.

    Layer l at time t, with `*` for convolution and products of tensors elementwise (equation 3; x is the hidden state
    of the layer below, for the first layer the folded frame; m is the memory that the layer below has left, for the
    first layer that of the last layer at the time step before, equation 2)::

        i = sigmoid(Wxi * x + Whi * h + bi)             i' = sigmoid(W'xi * x + Wmi * m + b'i)
        f = sigmoid(Wxf * x + Whf * h + bf)             f' = sigmoid(W'xf * x + Wmf * m + b'f)
        c' = f c + i tanh(Wxg * x + Whg * h + bg)       m' = f' m + i' tanh(W'xg * x + Wmg * m + b'g)
        o = sigmoid(Wxo * x + Who * h + Wco * c' + Wmo * m' + bo)
        h' = o tanh(W1x1 * [c', m'])

    The state is `(layers, memory)`: hidden and cell state of each layer, and the memory of the last one, each
    `[B, hidden[l], H, W]`.

    Attributes:
        cells: The layers.
        output: Hidden state of the last layer to the folded prediction.
    """

    def __init__(self, config: PredRNNConfig) -> None:
        super().__init__(config)
        self.config: PredRNNConfig = config
        first, *others = config.hidden
        size = config.folded_size
        self.cells = nn.ModuleList(
            [
                FirstSTLSTMCell(config.folded_channels, first, size, config.kernel_size),
                *(STLSTMCell(channels, size, config.kernel_size) for channels in others),
            ]
        )
        self.output = convolution(2, config.hidden[-1], config.folded_channels, 1)

    def initial_state(self, like: Tensor) -> PredRNNState:
        """Zero states for a batch of frames (one tensor of zeros, shared)."""
        zero = like.new_zeros(like.shape[0], self.config.hidden[0], *self.config.folded_size)
        return ((zero, zero),) * len(self.config.hidden), zero

    def step(self, clip: Tensor, state: PredRNNState) -> tuple[Tensor, PredRNNState]:
        """One time step: the predicted frame and the new state.

        Args:
            clip: A frame, `[B, channels, H, W]`.
            state: As described above.
        """
        x = self.config.fold(clip)
        layers, memory = state
        states = []
        for stlstm, (hidden, cell) in zip(self.cells, layers, strict=True):
            x, (hidden, cell, memory) = stlstm(x, (hidden, cell, memory))
            states.append((hidden, cell))
        return self.config.unfold(self.output(x)), (tuple(states), memory)
