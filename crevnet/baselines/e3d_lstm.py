"""E3D-LSTM (Wang et al. 2019, "Eidetic 3D LSTM: A Model for Video Prediction and Beyond").

Equations are the paper's, the configuration is that of the authors' code for Moving MNIST (github.com/google/e3d_lstm:
`src/models/eidetic_3d_lstm_net.py` and its training script).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from revgrad_kernels import cell_update, hidden_output
from torch import Tensor, nn
from torch.nn import functional as F

from crevnet.baselines.frame_config import FrameConfig, check_layers
from crevnet.video_model import RecurrentModel


@dataclass(kw_only=True)
class E3DLSTMConfig(FrameConfig):
    """Configuration of an E3D-LSTM. The defaults are the published ones for Moving MNIST.

    With `patch=1` the convolutions of a time step take 192.2 GFLOPs and the attention of the recall gates 68.7 per
    memory recalled; table 1 has 381.3. (The authors' code sends the spatiotemporal memory through one more convolution
    than their equations, 13.4 GFLOPs.)

    Raises:
        ValueError: No layers, layers of different width, an even spatial kernel, a negative or empty recall, or as in
            `FrameConfig`.
    """

    name: Literal["e3d-lstm"] = "e3d-lstm"
    """Which model this is."""
    hidden: tuple[int, ...] = (64, 64, 64, 64)
    """Channels of the states of each layer; the same for all, as one memory passes through them."""
    window: int = 2
    """Frames that the network sees at once, the newest and those before it: the depth of its feature maps."""
    kernel_size: int = 5
    """Odd size of the convolutions in space."""
    temporal_kernel_size: int = 2
    """Size of the convolutions in time."""
    recall: int | None = None
    """tau, how many past memories the recall gate attends to, the newest ones; null: all of them, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.hidden, self.kernel_size)
        if len(set(self.hidden)) > 1:
            raise ValueError(
                f"model.hidden must be the same for all layers, through which one memory passes, got {self.hidden}"
            )
        if self.recall is not None and self.recall < 1:
            raise ValueError(f"model.recall must be null or at least 1, got {self.recall}")

    def build(self) -> "E3DLSTM":
        """The model, with random weights."""
        return E3DLSTM(self)


class WindowConvolution(nn.Conv3d):
    """A 3D convolution that keeps the size `[B, C, T, H, W]`; of an even temporal kernel the longer half reads ahead.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        temporal: Size of the kernel in time.
        spatial: Its odd size in space.
        bias: Whether to add one.
    """

    def __init__(self, inputs: int, outputs: int, temporal: int, spatial: int, *, bias: bool) -> None:
        super().__init__(
            inputs, outputs, (temporal, spatial, spatial), padding=(0, spatial // 2, spatial // 2), bias=bias
        )
        self.past, self.future = (temporal - 1) // 2, temporal // 2

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of `[B, inputs, T, H, W]`, to `[B, outputs, T, H, W]`."""
        return super().forward(F.pad(x, (0, 0, 0, 0, self.past, self.future)))


def recall(query: Tensor, memories: list[Tensor]) -> Tensor:
    """Attention over past memories, with the recall gate as query and the memories as both keys and values.

    `softmax(R M^T) M`, without a scale, over all positions and times: R is the gate as `[B, T H W, C]`, M all memories
    as `[B, n T H W, C]`.

    Args:
        query: Recall gate, `[B, C, T, H, W]`.
        memories: Each `[B, C, T, H, W]`.

    Returns:
        `[B, C, T, H, W]`.
    """
    # With a dimension of heads, here one, and channels last PyTorch has kernels that keep no attention matrix.
    keys = torch.cat([rearrange(m, "b c t h w -> b 1 (t h w) c") for m in memories], dim=2)
    queries = rearrange(query, "b c t h w -> b 1 (t h w) c").contiguous()
    found = F.scaled_dot_product_attention(queries, keys, keys, scale=1.0)
    t, h, w = query.shape[2:]
    return rearrange(found, "b 1 (t h w) c -> b c t h w", t=t, h=h, w=w)


class EideticLSTMCell(nn.Module):
    """One layer of an E3D-LSTM.

    With `*` for 3D convolution and products of tensors elementwise; x is the hidden state of the layer below (for the
    first layer the window of frames), m the spatiotemporal memory that the layer below has left (for the first layer
    that of the last layer at the time step before), C the cell states of all time steps before::

        r = sigmoid(Wxr * x + Whr * h + br)
        i = sigmoid(Wxi * x + Whi * h + bi)
        c' = i tanh(Wxg * x + Whg * h + bg) + LayerNorm(c + softmax(r C^T) C)
        i' = sigmoid(W'xi * x + Wmi * m + b'i)
        f' = sigmoid(W'xf * x + Wmf * m + b'f)
        m' = f' m + i' tanh(W'xg * x + Wmg * m + b'g)
        o = sigmoid(Wxo * x + Who * h + Wco * c' + Wmo * m' + bo)
        h' = o tanh(W1x1x1 * [c', m'])

    Layer normalisation is over all elements of a sample, with one scale and shift per channel, as in the authors' code.
    That code departs from the equations: it also normalises the outputs of the convolutions, has `f' tanh(Wmm * m)` for
    `f' m` and `sigmoid(tanh(..))` for the output gate, adds 1 before the sigmoid of f', and hands on m, not m'.

    Args:
        inputs: Channels of x.
        channels: C, of the states.
        temporal: Size of the kernels in time.
        spatial: Their odd size in space.

    Attributes:
        from_input: The convolutions of r, i, g, o, i', f' and g' over x, in this order.
        from_hidden: Those of r, i, g and o over h.
        from_memory: Those of i', f' and g' over m.
        output_gate: That of o over `[c', m']`.
        fuse: W1x1x1.
        norm: The layer normalisation.
    """

    def __init__(self, inputs: int, channels: int, temporal: int, spatial: int) -> None:
        super().__init__()
        self.from_input = WindowConvolution(inputs, 7 * channels, temporal, spatial, bias=True)
        self.from_hidden = WindowConvolution(channels, 4 * channels, temporal, spatial, bias=False)
        self.from_memory = WindowConvolution(channels, 3 * channels, temporal, spatial, bias=False)
        self.output_gate = WindowConvolution(2 * channels, channels, temporal, spatial, bias=False)
        self.fuse = WindowConvolution(2 * channels, channels, 1, 1, bias=False)
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, x: Tensor, hidden: Tensor, cells: list[Tensor], memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One time step: the new hidden state, cell state and memory.

        Args:
            x: `[B, inputs, T, H, W]`.
            hidden: `[B, C, T, H, W]`.
            cells: Past cell states, each of that shape, the newest last.
            memory: Of that shape.
        """
        n = memory.shape[1]
        of_cell, of_memory = self.from_input(x).split([4 * n, 3 * n], dim=1)
        r, i, g, o = (of_cell + self.from_hidden(hidden)).split(n, dim=1)
        eidetic = self.norm(cells[-1] + recall(torch.sigmoid(r), cells))
        cell = eidetic + torch.sigmoid(i) * torch.tanh(g)
        memory = cell_update(of_memory + self.from_memory(memory), memory)
        both = torch.cat([cell, memory], dim=1)
        return hidden_output(o + self.output_gate(both), self.fuse(both)), cell, memory


@dataclass(frozen=True)
class E3DLSTMState:
    """What an E3D-LSTM keeps between time steps; the shape of its states is `[B, C, window, H, W]`."""

    frames: tuple[Tensor, ...]
    """The folded frames of the window before the newest, `[B, folded_channels, H, W]` each."""
    hidden: tuple[Tensor, ...]
    """Hidden state of each layer."""
    cells: tuple[list[Tensor], ...]
    """Past cell states of each layer, the newest last; there are as many as may be recalled."""
    memory: Tensor
    """Spatiotemporal memory of the last layer."""


class E3DLSTM(RecurrentModel):
    """Stacked E3D-LSTM over a sliding window of folded frames.

    The windows of consecutive time steps overlap by all frames but one; before the first frame there are zeros, and the
    first memory to recall is the zero cell state. A 3D convolution as deep as the window, without an activation, turns
    the last layer's hidden state into the prediction. The authors' code has no other encoder or decoder around the
    layers than this and the folding.

    Attributes:
        layers: The layers.
        output: Hidden state of the last layer to the folded prediction.
    """

    def __init__(self, config: E3DLSTMConfig) -> None:
        super().__init__(config)
        self.config: E3DLSTMConfig = config
        self.layers = nn.ModuleList(
            EideticLSTMCell(inputs, channels, config.temporal_kernel_size, config.kernel_size)
            for inputs, channels in zip((config.folded_channels, *config.hidden[:-1]), config.hidden, strict=True)
        )
        self.output = nn.Conv3d(config.hidden[-1], config.folded_channels, (config.window, 1, 1))

    def initial_state(self, like: Tensor) -> E3DLSTMState:
        """Zero states for a batch of frames (one tensor of zeros, shared)."""
        config = self.config
        zero = like.new_zeros(like.shape[0], config.hidden[0], config.window, *config.folded_size)
        frame = like.new_zeros(like.shape[0], config.folded_channels, *config.folded_size)
        layers = len(config.hidden)
        return E3DLSTMState((frame,) * (config.window - 1), (zero,) * layers, ([zero],) * layers, zero)

    def step(self, clip: Tensor, state: E3DLSTMState) -> tuple[Tensor, E3DLSTMState]:
        """One time step: the predicted frame and the new state.

        Args:
            clip: A frame, `[B, channels, H, W]`.
            state: What `initial_state` or the step before returned.
        """
        frames = (*state.frames, self.config.fold(clip))
        x = torch.stack(frames, dim=2)
        memory = state.memory
        new_hidden, new_cells = [], []
        for layer, hidden, cells in zip(self.layers, state.hidden, state.cells, strict=True):
            x, cell, memory = layer(x, hidden, cells, memory)
            new_hidden.append(x)
            new_cells.append([*cells, cell][-(self.config.recall or 0) :])
        prediction = self.config.unfold(self.output(x).squeeze(2))
        return prediction, E3DLSTMState(frames[1:], tuple(new_hidden), tuple(new_cells), memory)
