"""A language model with the reversible layers of Reformer (Kitaev et al. 2020), on the texts of Python's `help()`.

python examples/reformer.py --steps 150
"""

from pydoc_data.topics import topics

import torch
from comparison import Training, arguments, compare
from torch import Tensor, nn
from torch.nn import functional

from revgrad import from_pairs

WIDTH, HEADS, DEPTH, LENGTH, BATCH = 64, 4, 6, 64, 8


class Attention(nn.Module):
    """Causal self-attention `[B, N, WIDTH]`, normalised first. (Reformer's own attention hashes; any will do.)"""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(self.norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def feed_forward() -> nn.Module:
    """The other half of a layer, with dropout: random numbers are replayed in the backward pass."""
    return nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)
    )


class LanguageModel(nn.Module):
    """Characters `[B, N]` to logits `[B, N, characters]`."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layers = from_pairs([(Attention(), feed_forward()) for _ in range(DEPTH)])
        self.head = nn.Sequential(nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, characters))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        return self.head(torch.cat(self.layers(x, x), dim=-1))


def main(argv: list[str] | None = None) -> dict[str, Training]:
    """Train both ways."""
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    tokens = torch.tensor([number[character] for character in text[:100_000]])

    def loss(model: nn.Module, step: int) -> Tensor:
        windows = tokens[torch.randint(len(tokens) - LENGTH, (BATCH, 1)) + torch.arange(LENGTH + 1)]
        logits = model(windows[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    return compare(lambda: LanguageModel(len(alphabet)), loss, arguments(argv, steps=150).steps)


if __name__ == "__main__":
    main()
