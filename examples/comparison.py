"""What all examples share: train the same model twice, stored and reversible, and print memory, time and loss."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from revgrad import LiveMemory, ReversibleSequential


@dataclass(frozen=True)
class Training:
    """One training run."""

    model: nn.Module
    losses: list[float]
    peak: int
    """Largest memory of a training step in bytes, beyond weights and data."""
    seconds: float
    """Median over the steps."""


def arguments(argv: list[str] | None, steps: int) -> argparse.Namespace:
    """The command line of every example."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="training steps")
    return parser.parse_args(argv)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scikit-learn's digits: images `[N, 1, 8, 8]` in 0..1 and labels to train with, then 300 of each to test with."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[300:]], y[order[300:]], x[order[:300]], y[order[:300]]


def compare_classifiers(build: Callable[[], nn.Module], argv: list[str] | None) -> dict[str, Training]:
    """Train a classifier of digits in both modes, and print the accuracy on digits that were not trained on.

    Args:
        build: Makes a model that maps images to logits.
        argv: The command line.
    """
    x, y, x_test, y_test = digits()

    def loss(model: nn.Module, step: int) -> Tensor:
        batch = torch.randint(len(x), (64,))
        return functional.cross_entropy(model(x[batch]), y[batch])

    runs = compare(build, loss, arguments(argv, steps=150).steps)
    for mode, run in runs.items():
        with torch.no_grad():
            right = run.model.eval()(x_test).argmax(1) == y_test
        print(f"{mode}: {right.float().mean():.1%} of the test digits right")
    return runs


def compare(
    build: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module, int], Tensor],
    steps: int,
    learning_rate: float = 2e-3,
    modes: tuple[str, ...] = ("stored", "reversible"),
) -> dict[str, Training]:
    """Train from the same weights in each mode, and print a table.

    Args:
        build: Makes the model.
        loss_of: The loss of a model at a step. It must draw its batch from the step or the global generator.
        steps: Training steps.
        learning_rate: Of Adam.
        modes: Of the reversible chains in the model.
    """
    runs = {mode: _train(build, loss_of, steps, learning_rate, mode) for mode in modes}
    print(f"{'':12}{'memory of a step':>18}{'time of a step':>16}{'first loss':>12}{'last loss':>11}")
    for mode, run in runs.items():
        cost = f"{run.peak / 2**20:14.2f} MiB{1e3 * run.seconds:13.1f} ms"
        print(f"{mode:12}{cost}{run.losses[0]:12.4f}{run.losses[-1]:11.4f}")
    return runs


def _train(
    build: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module, int], Tensor],
    steps: int,
    learning_rate: float,
    mode: str,
) -> Training:
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, ReversibleSequential):
            module.mode = mode
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    losses, seconds = [], []
    memory = LiveMemory()
    for step in range(steps):
        start = time.perf_counter()
        if step == 1:  # the first step may initialise
            with memory:
                losses.append(_step(model, loss_of, step))
        else:
            losses.append(_step(model, loss_of, step))
            seconds.append(time.perf_counter() - start)
        optimizer.step()
        optimizer.zero_grad()
    return Training(model, losses, memory.peak, sorted(seconds)[len(seconds) // 2])


def _step(model: nn.Module, loss_of: Callable[[nn.Module, int], Tensor], step: int) -> float:
    loss = loss_of(model, step)
    loss.backward()
    return loss.item()
