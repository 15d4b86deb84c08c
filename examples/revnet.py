"""A RevNet (Gomez et al. 2017) that classifies scikit-learn's digits.

python examples/revnet.py --steps 150
"""

from comparison import Training, compare_classifiers
from torch import nn

from revgrad import from_pairs

WIDTH, DEPTH = 32, 12


def residual(channels: int) -> nn.Module:
    """What a residual block adds. Any module will do: batch normalisation moves its statistics once a step."""
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False),
    )  # fmt: skip


def classifier() -> nn.Module:
    """`[B, 1, 8, 8]` to logits `[B, 10]`. Only the blocks in the middle are reversible."""
    half = WIDTH // 2
    blocks = from_pairs([(residual(half), residual(half)) for _ in range(DEPTH)], split_dim=1)
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1), blocks, nn.BatchNorm2d(WIDTH), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Training]:
    """Train both ways and print the accuracy on digits that were not trained on."""
    return compare_classifiers(classifier, argv)


if __name__ == "__main__":
    main()
