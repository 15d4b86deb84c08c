"""PredRNN++ (Wang et al. 2018, "PredRNN++: Towards A Resolution of the Deep-in-Time Dilemma in Spatiotemporal
Predictive Learning"), as a next-frame predictor.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from revgrad_kernels import cell_update
from torch import Tensor, nn

from crevnet.baselines.frame_config import FrameConfig, check_layers
from crevnet.convolution import convolution
from crevnet.video_model import RecurrentModel


@dataclass(kw_only=True)
class PredRNNPlusPlusConfig(FrameConfig):
    """Configuration of a PredRNN++. The defaults are the published ones.

    With `patch=1` a frame takes 117.5 GFLOPs by the paper's equations, where table 1 says 106.8. The authors' code
    differs from their equations (5x5 instead of 1x1 for `W3`, `h` read by the output gate, `m` not read by `g'`) and
    would take 123.1.

    Raises:
        ValueError: Fewer than two layers, a layer without channels, an even kernel, or as in `FrameConfig`.
    """

    name: Literal["predrnn++"] = "predrnn++"
    """Which model this is."""
    hidden: tuple[int, ...] = (128, 64, 64, 64)
    """Channels of the states of each layer."""
    highway: int = 128
    """Channels of the gradient highway between the first layer and the second."""
    kernel_size: int = 5
    """Odd size of the convolutions of all gates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.hidden, self.kernel_size, at_least=2)

    def build(self) -> "PredRNNPlusPlus":
        """The model, with random weights."""
        return PredRNNPlusPlus(self)


class CausalLSTMCell(nn.Module):
    """Causal LSTM: two memories, the second updated from the first (equation 2 of Wang et al. 2018).

    With `*` for convolution, products of tensors elementwise, and all convolutions with the biases that the paper does
    not write out::

        i, f, g = sigmoid, sigmoid, tanh of W1 * [x, h, c]
        c' = f c + i g
        i', f', g' = sigmoid, sigmoid, tanh of W2 * [x, c', m]
        m' = f' tanh(W3 * m) + i' g'
        o = tanh(W4 * [x, c', m'])
        h' = o tanh(W5 * [c', m'])

    Args:
        inputs: Channels of x.
        memory: Channels of m, the memory that comes from the layer before.
        channels: C, of all other states.
        kernel_size: Odd size of `W1`, `W2` and `W4`; `W3` and `W5` are 1x1.
    """

    def __init__(self, inputs: int, memory: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.cell_gates = convolution(2, inputs + 2 * channels, 3 * channels, kernel_size)
        self.memory_gates = convolution(2, inputs + channels + memory, 3 * channels, kernel_size)
        self.memory_transition = convolution(2, memory, channels, 1)
        self.output_gate = convolution(2, inputs + 2 * channels, channels, kernel_size)
        self.fuse = convolution(2, 2 * channels, channels, 1)

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One time step: the new hidden state, cell state and memory, each `[B, C, H, W]`.

        Args:
            x: `[B, inputs, H, W]`.
            hidden: `[B, C, H, W]`.
            cell: `[B, C, H, W]`.
            memory: `[B, memory, H, W]`.
        """
        cell = cell_update(self.cell_gates(torch.cat([x, hidden, cell], dim=1)), cell)
        gates = self.memory_gates(torch.cat([x, cell, memory], dim=1))
        memory = cell_update(gates, torch.tanh(self.memory_transition(memory)))
        output = torch.tanh(self.output_gate(torch.cat([x, cell, memory], dim=1)))
        return output * torch.tanh(self.fuse(torch.cat([cell, memory], dim=1))), cell, memory


class GradientHighwayUnit(nn.Module):
    """A gated state with a short way back through time (equation 3 of Wang et al. 2018).

    With `*` for convolution and products of tensors elementwise::

        p = tanh(Wpx * x + Wpz * z + bp)
        s = sigmoid(Wsx * x + Wsz * z + bs)
        z' = s p + (1 - s) z

    Args:
        inputs: Channels of x.
        channels: Channels of z.
        kernel_size: Odd size of the convolutions.
    """

    def __init__(self, inputs: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.gates = convolution(2, inputs + channels, 2 * channels, kernel_size)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """One time step: the new state z.

        Args:
            x: `[B, inputs, H, W]`.
            state: z, `[B, channels, H, W]`.
        """
        p, s = self.gates(torch.cat([x, state], dim=1)).chunk(2, dim=1)
        return torch.lerp(state, torch.tanh(p).to(state.dtype), torch.sigmoid(s).to(state.dtype))


@dataclass
class PredRNNPlusPlusState:
    """What a time step leaves for the next one."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    """Hidden and cell state of each layer, `[B, hidden[l], H, W]` both."""
    memory: Tensor
    """The second memory as the last layer left it, `[B, hidden[-1], H, W]`; the first layer goes on from it."""
    highway: Tensor
    """The state of the gradient highway, `[B, highway, H, W]`."""


class PredRNNPlusPlus(RecurrentModel):
    """Stacked Causal LSTM with a gradient highway between the first two layers (equation 4 of Wang et al. 2018).

    The first layer reads the folded frame, the second one the highway, which reads the hidden state of the first; each
    other layer reads the hidden state below. The memory passes through all layers and on to the first one at the next
    time step. A 1x1 convolution leads back to the folded frame.

    Attributes:
        cells: The layers.
        highway: The gradient highway unit.
        output: Hidden state of the last layer to the folded prediction.
    """

    def __init__(self, config: PredRNNPlusPlusConfig) -> None:
        super().__init__(config)
        self.config: PredRNNPlusPlusConfig = config
        hidden = config.hidden
        inputs = (config.folded_channels, config.highway, *hidden[1:-1])
        memories = (hidden[-1], *hidden[:-1])
        self.cells = nn.ModuleList(
            CausalLSTMCell(*channels, config.kernel_size) for channels in zip(inputs, memories, hidden, strict=True)
        )
        self.highway = GradientHighwayUnit(hidden[0], config.highway, config.kernel_size)
        self.output = convolution(2, hidden[-1], config.folded_channels, 1)

    def initial_state(self, like: Tensor) -> PredRNNPlusPlusState:
        """Zero states for a batch of frames."""

        def zeros(channels: int) -> Tensor:
            return like.new_zeros(like.shape[0], channels, *self.config.folded_size)

        hidden = self.config.hidden
        return PredRNNPlusPlusState(
            tuple((zeros(c),) * 2 for c in hidden), zeros(hidden[-1]), zeros(self.config.highway)
        )

    def step(self, clip: Tensor, state: PredRNNPlusPlusState) -> tuple[Tensor, PredRNNPlusPlusState]:
        """One time step: the predicted frame and the new state.

        Args:
            clip: A frame, `[B, channels, H, W]`.
            state: What `initial_state` or the step before returned.
        """
        x = self.config.fold(clip)
        memory, highway = state.memory, state.highway
        layers = []
        for layer, (causal, (hidden, cell)) in enumerate(zip(self.cells, state.layers, strict=True)):
            if layer == 1:
                x = highway = self.highway(x, highway)
            x, cell, memory = causal(x, hidden, cell, memory)
            layers.append((x, cell))
        return self.config.unfold(self.output(x)), PredRNNPlusPlusState(tuple(layers), memory, highway)
