"""The reversible predictive module (section 2.2) and the predictor made of them."""

from typing import Literal, get_args

from torch import Tensor, nn

from crevnet.cells import CELL, CELLS, State
from crevnet.convolution import convolution
from revgrad import CellUpdate, GatedCoupling, ReversibleSequential

CellStates = Literal["kept", "inverted"]
AttentionNorm = Literal["none", "group"]


class PredictiveTransform(nn.Module):
    """What a predictive module computes from the stream it reads: hidden state and attention.

    `h = ConvRNN(x, state)`, `a = W2 * ReLU(W1 * h + b1) + b2`; the coupling then blends the other stream with `h` by
    `sigmoid(a)`. With a norm the ReLU reads `W1 * h + b1` normalised over all channels and places of a sample.
    """

    def __init__(self, cell: str, channels: int, size: tuple[int, ...], attention_norm: AttentionNorm = "none") -> None:
        super().__init__()
        self.cell = CELLS[cell](channels, size)
        norm = [nn.GroupNorm(1, channels)] if attention_norm == "group" else []
        self.attention = nn.Sequential(
            convolution(len(size), channels, channels),
            *norm,
            nn.ReLU(),
            convolution(len(size), channels, channels),
        )

    def forward(self, x: Tensor, state: State, update: CellUpdate | None = None) -> tuple[tuple[Tensor, Tensor], State]:
        """The message (attention logits, hidden state) and the new state; `update` as in the cell."""
        hidden, state = self.cell(x, state, update)
        return (self.attention(hidden), hidden), state


def reversible_predictor(
    cell: str,
    modules: int,
    channels: int,
    size: tuple[int, ...],
    cell_states: CellStates = "kept",
    attention_norm: AttentionNorm = "none",
) -> ReversibleSequential:
    """A chain of reversible predictive modules that alternate between the two streams.

    Args:
        cell: `convlstm` or `stlstm`.
        modules: Number of modules.
        channels: Channels of each stream.
        size: `(H, W)` or `(T, H, W)` of the streams.
        cell_states: Whether the backward pass finds them `kept`, or `inverted` from the last one; of no effect in float
            arithmetic.
        attention_norm: Normalisation between the two convolutions of the attentions: `none` or `group`.

    Raises:
        ValueError: Unknown cell or normalisation.
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {sorted(CELLS)}, got {cell!r}")
    if attention_norm not in get_args(AttentionNorm):
        raise ValueError(f"attention_norm must be one of {', '.join(get_args(AttentionNorm))}, got {attention_norm!r}")
    return ReversibleSequential(
        *(
            GatedCoupling(
                PredictiveTransform(cell, channels, size, attention_norm),
                source=i % 2,
                target=1 - i % 2,
                stateful=True,
                carries=CELLS[cell].carries,
                inverted_cell=CELL if cell_states == "inverted" else None,
            )
            for i in range(modules)
        )
    )
