"""CrevNet as one would write it from the paper's equations: plain modules, a convolution per gate, nothing fused.

It has the weights of a `CrevNet` and predicts the same; what the training step is measured against.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crevnet.cells import ConvLSTMCell, STLSTMCell
from crevnet.convolution import Convolution2d, Convolution3d
from crevnet.model import CrevNet

State = tuple[Tensor, ...]


class GateConvolution(nn.Module):
    """The convolution of one gate: a group of output channels of a fused one."""

    def __init__(self, fused: nn.Conv2d | nn.Conv3d, groups: int, number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(fused.weight.detach().chunk(groups)[number].clone())
        self.bias = None if fused.bias is None else nn.Parameter(fused.bias.detach().chunk(groups)[number].clone())
        self.function = F.conv2d if isinstance(fused, nn.Conv2d) else F.conv3d
        self.padding = fused.padding

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """From the input and one state."""
        return self.function(torch.cat([x, state], dim=1), self.weight, self.bias, padding=self.padding)


def gates(fused: nn.Conv2d | nn.Conv3d, groups: int) -> nn.ModuleList:
    """One convolution per gate."""
    return nn.ModuleList(GateConvolution(fused, groups, number) for number in range(groups))


class PlainConvLSTM(nn.Module):
    """Appendix A's ConvLSTM, equation by equation."""

    def __init__(self, cell: ConvLSTMCell) -> None:
        super().__init__()
        self.i, self.f, self.g, self.o = gates(cell.gates, 4)
        self.peephole = nn.Parameter(cell.peephole.detach().clone())

    def forward(self, x: Tensor, own: State, memory: Tensor | None) -> tuple[Tensor, State, Tensor | None]:
        """Hidden state, own new state, and no memory."""
        hidden, cell = own
        cell = torch.sigmoid(self.f(x, hidden)) * cell + torch.sigmoid(self.i(x, hidden)) * torch.tanh(
            self.g(x, hidden)
        )
        hidden = torch.sigmoid(self.o(x, hidden) + self.peephole * cell) * torch.tanh(cell)
        return hidden, (hidden, cell), memory


class PlainSTLSTM(nn.Module):
    """Appendix A's ST-LSTM, equation by equation."""

    def __init__(self, cell: STLSTMCell) -> None:
        super().__init__()
        self.i, self.f, self.g, self.o = gates(cell.cell_gates, 4)
        self.mi, self.mf, self.mg = gates(cell.memory_gates, 3)
        (self.output_gate,) = gates(cell.output_gate, 1)
        (self.fuse,) = gates(cell.fuse, 1)

    def forward(self, x: Tensor, own: State, memory: Tensor) -> tuple[Tensor, State, Tensor]:
        """Hidden state, own new state, and the memory for the next module."""
        hidden, cell = own
        cell = torch.sigmoid(self.f(x, hidden)) * cell + torch.sigmoid(self.i(x, hidden)) * torch.tanh(
            self.g(x, hidden)
        )
        memory = torch.sigmoid(self.mf(x, memory)) * memory + torch.sigmoid(self.mi(x, memory)) * torch.tanh(
            self.mg(x, memory)
        )
        hidden = torch.sigmoid(self.o(x, hidden) + self.output_gate(cell, memory)) * torch.tanh(self.fuse(cell, memory))
        return hidden, (hidden, cell), memory


class PlainCrevNet(nn.Module):
    """Encoder, predictive modules and decoder, one time step after the other.

    Args:
        model: Whose weights are copied; clips are three-dimensional.
    """

    def __init__(self, model: CrevNet) -> None:
        super().__init__()
        plain = {ConvLSTMCell: PlainConvLSTM, STLSTMCell: PlainSTLSTM}
        self.stages = model.config.blocks
        self.functions = by_pytorch(nn.ModuleList(m.transform for m in model.autoencoder if hasattr(m, "transform")))
        self.cells = nn.ModuleList(plain[type(m.transform.cell)](m.transform.cell) for m in model.predictor)
        self.attentions = by_pytorch(nn.ModuleList(m.transform.attention for m in model.predictor))
        self.shape = (model.width, *model.size)

    def forward(self, clips: Tensor) -> Tensor:
        """Predictions of teacher forcing, `[B, T, C, K, H, W]` from as many clips."""
        zero = clips.new_zeros(len(clips), *self.shape)
        states: list[State] = [(zero, zero)] * len(self.cells)
        memory: Tensor | None = zero
        predictions = []
        for clip in clips.unbind(1):
            streams = self.encode(clip)
            for k, (cell, attention) in enumerate(zip(self.cells, self.attentions, strict=True)):
                hidden, states[k], memory = cell(streams[k % 2], states[k], memory)
                gate = torch.sigmoid(attention(hidden))
                streams[1 - k % 2] = (1 - gate) * streams[1 - k % 2] + gate * hidden
            predictions.append(self.decode(streams))
        return torch.stack(predictions, dim=1)

    def encode(self, clip: Tensor) -> list[Tensor]:
        """Two streams of features (eq. 2)."""
        functions, done = list(self.functions), 0
        streams = list(fold(clip).chunk(2, dim=1))
        for stage, blocks in enumerate(self.stages):
            if stage:
                streams = [fold(x) for x in streams]
            for _ in range(blocks):
                streams[done % 2] = streams[done % 2] + functions[done](streams[1 - done % 2])
                done += 1
        return streams

    def decode(self, streams: list[Tensor]) -> Tensor:
        """The inverse (eq. 3)."""
        streams, functions, done = list(streams), list(self.functions), len(self.functions)
        for stage, blocks in reversed(list(enumerate(self.stages))):
            for _ in range(blocks):
                done -= 1
                streams[done % 2] = streams[done % 2] - functions[done](streams[1 - done % 2])
            if stage:
                streams = [unfold(x) for x in streams]
        return unfold(torch.cat(streams, dim=1))

    def loss(self, clips: Tensor) -> Tensor:
        """Mean squared error of the next clips."""
        return F.mse_loss(self(clips[:, :-1]), clips[:, 1:])


def by_pytorch(modules: nn.ModuleList) -> nn.ModuleList:
    """A copy with PyTorch's own convolutions."""
    modules = deepcopy(modules)
    for module in list(modules.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, Convolution2d | Convolution3d):
                kind: Any = nn.Conv2d if isinstance(layer, Convolution2d) else nn.Conv3d
                size = layer.in_channels, layer.out_channels, layer.kernel_size
                own = kind(*size, padding=layer.padding, bias=layer.bias is not None, dtype=layer.weight.dtype)
                own.load_state_dict(layer.state_dict())
                setattr(module, name, own)
    return modules


def fold(x: Tensor) -> Tensor:
    """Space to channels, 2 x 2 pixels."""
    b, c, t, h, w = x.shape
    return x.view(b, c, t, h // 2, 2, w // 2, 2).permute(0, 1, 4, 6, 2, 3, 5).reshape(b, 4 * c, t, h // 2, w // 2)


def unfold(x: Tensor) -> Tensor:
    """Channels to space."""
    b, c, t, h, w = x.shape
    return x.view(b, c // 4, 2, 2, t, h, w).permute(0, 1, 4, 5, 2, 6, 3).reshape(b, c // 4, t, 2 * h, 2 * w)
