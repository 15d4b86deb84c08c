"""Stacked ConvLSTM and ST-LSTM (Table 2): recurrent layers one above the other at one resolution, over frames or, with
3D convolutions, over clips.

The rows "Stacked-RNN" of Table 2 are ConvLSTM and PredRNN of Table 1, the models `convlstm` and `predrnn` here; the
rows "3D Stacked-RNN" are this model. The paper says no more of it than its name, so everything else is chosen:

- The recurrent equations are those of appendix A (`crevnet.cells`), as in CrevNet's predictor, with 3D convolutions.
- Four layers of 128 channels on frames folded into patches of 4 x 4 pixels: as the 2D rows. Time is not folded.
- 3 x 3 x 3 kernels: 27 weights per pair of channels, where the 5 x 5 of the 2D rows have 25.
- Clips of three frames that overlap, read and predicted whole, as CrevNet's.
- The cells have as many input as hidden channels, so a 1 x 1 convolution widens what they read; another one makes the
  prediction from the last layer's hidden state, without an activation.
"""

from dataclasses import dataclass
from typing import Literal

from revgrad_kernels import pixel_shuffle, pixel_unshuffle
from torch import Tensor, nn

from crevnet.cells import CELLS, State, zero_states
from crevnet.clips import Stacking
from crevnet.convolution import check_odd, convolution
from crevnet.frame_size import check_foldable
from crevnet.video_model import RecurrentModel, VideoConfig
from revgrad import ChainState


@dataclass(kw_only=True)
class StackedRNNConfig(VideoConfig):
    """Configuration of a stack of recurrent layers. The defaults are the 3D rows of Table 2 (none stated in the paper).

    Raises:
        ValueError: The patch does not divide the frame, or the kernel size is even.
    """

    name: Literal["stacked-rnn"] = "stacked-rnn"
    """Which model this is."""
    clip: int = 3
    """Frames per time step."""
    stacking: Stacking = "depth"
    """`depth`: time is a dimension of a clip, convolutions are 3D; `channels`: the frames of a clip are channels,
    convolutions are 2D.
    """
    cell: Literal["convlstm", "stlstm"] = "stlstm"
    """Recurrent cell."""
    layers: int = 4
    """Recurrent layers."""
    hidden: int = 128
    """Channels of every layer's states."""
    kernel_size: int = 3
    """Odd size of the recurrent convolutions, in every dimension."""
    patch: int = 4
    """Pixels (patch x patch) of a frame folded into channels before the network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_foldable(self.image_size, self.patch, f"model.patch {self.patch}, by which frames are folded")
        check_odd("kernel_size", self.kernel_size)

    def build(self) -> "StackedRNN":
        """The model, with random weights."""
        return StackedRNN(self)


class RecurrentStack(nn.Module):
    """Recurrent layers, each of which reads the hidden state of the one below at the same time step.

    Args:
        cell: `convlstm` or `stlstm`, whose memory zigzags through the layers.
        layers: Number of layers.
        channels: Channels of input and states.
        size: `(H, W)` or `(T, H, W)` of the feature map.
        kernel_size: Odd size of all convolutions.
    """

    def __init__(self, cell: str, layers: int, channels: int, size: tuple[int, ...], kernel_size: int = 3) -> None:
        super().__init__()
        self.cells = nn.ModuleList(CELLS[cell](channels, size, kernel_size) for _ in range(layers))

    def forward(self, x: Tensor, states: ChainState) -> tuple[Tensor, ChainState]:
        """One time step: `[B, channels, *size]` to the last layer's hidden state of that shape, and the new states."""
        left: list[State] = []
        carry = states.carry
        for cell, own in zip(self.cells, states.layers, strict=True):
            x, state = cell(x, (*own, *carry))
            left.append(state[: len(own)])
            carry = state[len(own) :]
        return x, ChainState(tuple(left), carry)


class StackedRNN(RecurrentModel):
    """A stack of recurrent layers over folded clips, which predicts the next clip at every time step.

    Args:
        config: What the model is made from.
    """

    def __init__(self, config: StackedRNNConfig) -> None:
        super().__init__(config)
        self.config: StackedRNNConfig = config
        frames, *depth, height, width = config.clip_shape()
        folded = frames * config.patch**2
        self.size = (*depth, height // config.patch, width // config.patch)
        dimensions = len(self.size)
        self.embed = convolution(dimensions, folded, config.hidden, 1)
        self.stack = RecurrentStack(config.cell, config.layers, config.hidden, self.size, config.kernel_size)
        self.head = convolution(dimensions, config.hidden, folded, 1)

    def initial_state(self, like: Tensor) -> ChainState:
        """Zero states for a batch of clips."""
        zero = like.new_zeros(like.shape[0], self.config.hidden, *self.size)
        return zero_states(self.config.cell, self.config.layers, zero)

    def step(self, clip: Tensor, state: ChainState) -> tuple[Tensor, ChainState]:
        """As in `RecurrentModel`."""
        hidden, state = self.stack(self.embed(pixel_unshuffle(clip, self.config.patch)), state)
        return pixel_shuffle(self.head(hidden), self.config.patch), state
