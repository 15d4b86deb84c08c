"""An i-RevNet (Jacobsen et al. 2018): a classifier whose features hold the whole image, bit for bit.

python examples/irevnet.py --steps 150
"""

import torch
from comparison import Training, arguments, compare, digits
from torch import Tensor, nn
from torch.nn import functional

from revgrad import AdditiveCoupling, Concatenate, PixelUnshuffle, ReversibleLayer, ReversibleSequential, Split, snap

DEPTH, BATCH = 6, 64


def stage(channels: int) -> list[ReversibleLayer]:
    """Fold 2 x 2 pixels into channels, then update the halves of the channels in turn."""
    half = 4 * channels // 2

    def update() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(half, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, half, 3, padding=1), nn.InstanceNorm2d(half)
        )

    couplings = [AdditiveCoupling(update(), source=i % 2, target=1 - i % 2) for i in range(DEPTH)]
    return [PixelUnshuffle(2), Split(), *couplings, Concatenate()]


class Classifier(nn.Module):
    """`[B, 1, 8, 8]` to logits `[B, 10]`, by way of features `[B, 16, 2, 2]` that lose nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ReversibleSequential(*stage(1), *stage(4), arithmetic="exact")
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).flatten(1))


def main(argv: list[str] | None = None) -> dict[str, Training]:
    """Train both ways, then read the images back from the features."""
    x, y, x_test, y_test = digits()

    def loss(model: nn.Module, step: int) -> Tensor:
        batch = torch.randint(len(x), (BATCH,))
        return functional.cross_entropy(model(x[batch]), y[batch])

    runs = compare(Classifier, loss, arguments(argv, steps=150).steps)
    for mode, run in runs.items():
        model = run.model.eval()
        with torch.no_grad():
            right = model(x_test).argmax(1) == y_test
            back = model.encoder.inverse(model.encoder(x_test))
        same = "" if torch.equal(back, snap(x_test)) else "not "
        print(f"{mode}: {right.float().mean():.1%} right; images from features: {same}the same, bit for bit")
    return runs


if __name__ == "__main__":
    main()
