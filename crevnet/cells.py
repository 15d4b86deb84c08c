"""ConvLSTM and ST-LSTM, the recurrent cells of the predictor (appendix A).

Gates that read the same two tensors are one convolution over both. A cell is called as `cell(x, state)` and returns
the hidden state and the new state; `carries` says how many trailing tensors of the state go to the next module
rather than the next time step.

The gates that update the cell state do not read it. So a cell can leave that update to whoever inverts it, and calls
the `update` it is given; by default it is one kernel with the other pointwise operations.
"""

import torch
from revgrad_kernels import cell_update, convlstm, hidden_output, stlstm_states
from revgrad_kernels.recurrent import split_gates
from torch import Tensor, nn

from crevnet.convolution import convolution, convolve
from revgrad import CellUpdate, ChainState

State = tuple[Tensor, ...]
CELL = 1
"""Position of the cell state in the state of every cell here."""


class ConvLSTMCell(nn.Module):
    """Convolutional LSTM (Shi et al. 2015) with the peephole of the output gate, `Wco`, elementwise.

    The state is `(hidden, cell)`, each `[B, C, (T,) H, W]` like the input.

    Args:
        channels: C, of input, hidden and cell state alike.
        size: Size of the feature map, `(H, W)` or `(T, H, W)`: `Wco` has one weight per element.
        kernel_size: Odd size of all convolutions.
    """

    states = 2
    carries = 0

    def __init__(self, channels: int, size: tuple[int, ...], kernel_size: int = 3) -> None:
        super().__init__()
        self.gates = convolution(len(size), 2 * channels, 4 * channels, kernel_size)
        self.peephole = nn.Parameter(torch.zeros(channels, *size))

    def forward(self, x: Tensor, state: State, update: CellUpdate | None = None) -> tuple[Tensor, State]:
        """One time step.

        Args:
            x: Input.
            state: Hidden and cell state.
            update: How to update the cell state.

        Raises:
            ValueError: The input is not of the size that the peephole was made for.
        """
        hidden, cell = state
        if x.shape[1:] != self.peephole.shape:
            raise ValueError(
                f"ConvLSTMCell: input {tuple(x.shape)} does not fit the peephole {tuple(self.peephole.shape)}; "
                "build the model for this frame size"
            )
        gates, bias = convolve(self.gates, torch.cat([x, hidden], dim=1))
        if update is None:
            hidden, cell = convlstm(gates, cell, self.peephole, bias)
        else:
            i, f, g, o = split_gates(4, gates, bias, cell.dtype)
            cell = update(cell, f, hidden_output(i, g))
            hidden = hidden_output(o, cell, self.peephole * cell)
        return hidden, (hidden, cell)


class STLSTMCell(nn.Module):
    """Spatiotemporal LSTM (PredRNN, Wang et al. 2017): a second memory that runs through the layers.

    The state is `(hidden, cell, memory)`, each `[B, C, (T,) H, W]`. The memory comes from the module before at the
    same time step, for the first module from the last one at the time step before (the zigzag); so it is carried on.

    Args:
        channels: C, of input and states alike.
        size: Size of the feature map, `(H, W)` or `(T, H, W)`; only its number of dimensions matters.
        kernel_size: Odd size of all gate convolutions.
    """

    states = 2
    carries = 1

    def __init__(self, channels: int, size: tuple[int, ...], kernel_size: int = 3) -> None:
        super().__init__()
        d = len(size)
        self.cell_gates = convolution(d, 2 * channels, 4 * channels, kernel_size)
        self.memory_gates = convolution(d, 2 * channels, 3 * channels, kernel_size)
        self.output_gate = convolution(d, 2 * channels, channels, kernel_size, bias=False)
        self.fuse = convolution(d, 2 * channels, channels, 1, bias=False)

    def forward(self, x: Tensor, state: State, update: CellUpdate | None = None) -> tuple[Tensor, State]:
        """One time step.

        Args:
            x: Input.
            state: Hidden state, cell state and memory.
            update: How to update the cell state.
        """
        hidden, cell, memory = state
        gates, bias = convolve(self.cell_gates, torch.cat([x, hidden], dim=1))
        memory_gates, memory_bias = convolve(self.memory_gates, torch.cat([x, memory], dim=1))
        if update is None:
            cell, memory, both, output = stlstm_states(gates, memory_gates, cell, memory, bias, memory_bias)
        else:
            i, f, g, output = split_gates(4, gates, bias, cell.dtype)
            cell = update(cell, f, hidden_output(i, g))
            memory = cell_update(memory_gates, memory, memory_bias)
            both = torch.cat([cell, memory], dim=1)
        hidden = hidden_output(output, self.fuse(both), self.output_gate(both))
        return hidden, (hidden, cell, memory)


CELLS: dict[str, type[ConvLSTMCell] | type[STLSTMCell]] = {"convlstm": ConvLSTMCell, "stlstm": STLSTMCell}


def zero_states(cell: str, layers: int, zero: Tensor) -> ChainState:
    """The states before the first time step, of a stack of cells or a chain of modules around them.

    Args:
        cell: `convlstm` or `stlstm`.
        layers: Number of layers.
        zero: Zeros of a state's shape, `[B, C, (T,) H, W]`; all states share them.
    """
    kind = CELLS[cell]
    return ChainState(((zero,) * kind.states,) * layers, (zero,) * kind.carries)
