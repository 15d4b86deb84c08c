"""A flow in the manner of Glow (Kingma and Dhariwal 2018): the exact likelihood of digits, and new digits.

python examples/glow.py --steps 300
"""

import math

import torch
from comparison import Training, arguments, compare, digits
from torch import Tensor, nn

from revgrad import (
    ActNorm,
    AffineCoupling,
    Concatenate,
    InvertibleConv1x1,
    PixelUnshuffle,
    ReversibleLayer,
    ReversibleSequential,
    Split,
)

DEPTH, WIDTH, BATCH = 8, 32, 64


class Transform(nn.Sequential):
    """`[B, 2, 4, 4]` to a log-scale and a shift of that shape, both zero at first."""

    def __init__(self) -> None:
        last = nn.Conv2d(WIDTH, 4, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(nn.Conv2d(2, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU(), last)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x).chunk(2, dim=1)


def flow() -> ReversibleSequential:
    """Images `[B, 1, 8, 8]` to noise `[B, 4, 4, 4]`."""
    layers: list[ReversibleLayer] = [PixelUnshuffle(2)]
    for _ in range(DEPTH):
        layers += [ActNorm(4), InvertibleConv1x1(4), Split(), AffineCoupling(Transform(), bound=1.5), Concatenate()]
    return ReversibleSequential(*layers)


def bits_per_pixel(model: nn.Module, x: Tensor) -> Tensor:
    """Negative log-likelihood of grey levels 0 to 16, spread evenly over the interval between levels."""
    noise, log_det = model((x * 16 + torch.rand_like(x)) / 17 - 0.5, log_det=True)
    log_normal = -(noise.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2
    pixels = x[0].numel()
    return math.log2(17) - (log_normal + log_det).mean() / (pixels * math.log(2))


def main(argv: list[str] | None = None) -> dict[str, Training]:
    """Train both ways, then draw digits from noise."""
    x, _, x_test, _ = digits()

    def loss(model: nn.Module, step: int) -> Tensor:
        return bits_per_pixel(model, x[torch.randint(len(x), (BATCH,))])

    runs = compare(flow, loss, arguments(argv, steps=300).steps)
    for mode, run in runs.items():
        with torch.no_grad():
            print(f"{mode}: {bits_per_pixel(run.model.eval(), x_test):.3f} bits per pixel of the test digits")
    with torch.no_grad():
        drawn = runs["reversible"].model.inverse(0.7 * torch.randn(4, 4, 4, 4))
    shades = ((drawn + 0.5) * 5).clamp(0, 4).int()
    for row in torch.cat(list(shades[:, 0]), dim=1):
        print("".join(" .+#@"[level] * 2 for level in row))
    return runs


if __name__ == "__main__":
    main()
