"""An existing ResNet, trained on as a momentum network (Sander et al. 2021) with the weights that it has.

python examples/momentum.py --steps 100
"""

import copy

import torch
from comparison import Training, arguments, compare, digits
from torch import Tensor, nn
from torch.nn import functional

from revgrad import momentum_from

WIDTH, DEPTH, BATCH = 24, 10, 64


class Block(nn.Module):
    """A ResNet's block, which knows nothing of reversibility."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def resnet() -> nn.Sequential:
    """Stem, blocks and head: `[B, 1, 8, 8]` to logits `[B, 10]`."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1),
        nn.Sequential(*(Block() for _ in range(DEPTH))),
        nn.Sequential(nn.BatchNorm2d(WIDTH), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10)),
    )


def main(argv: list[str] | None = None) -> dict[str, Training]:
    """Train the ResNet as it is, then go on with a momentum, stored and reversible."""
    x, y, _, _ = digits()
    steps = arguments(argv, steps=100).steps

    def loss(model: nn.Module, step: int) -> Tensor:
        batch = torch.randint(len(x), (BATCH,))
        return functional.cross_entropy(model(x[batch]), y[batch])

    print("A ResNet:")
    plain = compare(resnet, loss, steps, modes=("stored",))["stored"].model

    def converted() -> nn.Module:
        stem, blocks, head = copy.deepcopy(plain)
        return nn.Sequential(stem, momentum_from(blocks, gamma=0.7, skip_inside=True, arithmetic="float"), head)

    print("The same blocks with a momentum:")
    return compare(converted, loss, steps)


if __name__ == "__main__":
    main()
