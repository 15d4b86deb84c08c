"""A reversible vision transformer (Mangalam et al. 2022) that classifies scikit-learn's digits.

python examples/vit.py --steps 150
"""

import torch
from comparison import Training, compare_classifiers
from torch import Tensor, nn

from revgrad import AdditiveCoupling, ReversibleSequential

WIDTH, HEADS, DEPTH = 48, 4, 8


class Attention(nn.Module):
    """Self-attention among patches, `[B, N, WIDTH]`, normalised first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


def mlp() -> nn.Module:
    """The other half of a block."""
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH))


class VisionTransformer(nn.Module):
    """`[B, 1, 8, 8]` to logits `[B, 10]`. Attention writes to one stream and the MLP to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        layers = []
        for _ in range(DEPTH):
            layers += [AdditiveCoupling(Attention(), source=1, target=0), AdditiveCoupling(mlp(), source=0, target=1)]
        self.blocks = ReversibleSequential(*layers)
        self.head = nn.Sequential(nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(torch.cat(self.blocks(x, x), dim=-1).mean(1))


def main(argv: list[str] | None = None) -> dict[str, Training]:
    """Train both ways and print the accuracy on digits that were not trained on."""
    return compare_classifiers(VisionTransformer, argv)


if __name__ == "__main__":
    main()
