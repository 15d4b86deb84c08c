"""CrevNet's convolutions on a CPU beside PyTorch's own: `pytest benchmarks/test_convolution.py --benchmark-only
--sweeps`.

Forward and backward pass of every convolution that the paper's model has, at several batch sizes; both take turns in
one process.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.reporting import Report, Table, spread
from benchmarks.training import random_clips
from crevnet.convolution_cpu import convolve
from crevnet.model import CrevNetConfig

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("one_thread")]

BATCHES = (1, 4, 16)
ROUNDS = 15
SECONDS = 0.02
"""How long a call is repeated in a round, about."""
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"

Shape = tuple[int, int, int, tuple[int, ...]]
"""Inputs, outputs, kernel size, and the size of the map."""

NOTES = (
    "The convolutions of the paper's Moving MNIST model with ST-LSTM, float32, one thread; output and the gradients of "
    "input, weight and bias.",
    "Time over PyTorch's: median of the ratios of all rounds. Where it is 1, PyTorch's own way is taken.",
    "FLOP/s: of our way, in billions, at the largest batch.",
)


@cache
def shapes() -> dict[Shape, int]:
    """Every kind of convolution in a time step, with how often there is one."""
    config = CrevNetConfig(mode="stored", arithmetic="float")
    model, found = config.build(), Counter[Shape]()

    def note(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        found[layer.in_channels, layer.out_channels, layer.kernel_size[-1], tuple(output.shape[2:])] += 1

    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(random_clips(config, 1, 1)[:, :1])
    return dict(sorted(found.items()))


@pytest.fixture(scope="module")
def results(publish) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    columns = {"convolution": "convolution", "number": "in a time step"}
    columns |= {f"ratio_{b}": f"over PyTorch, batch {b}" for b in BATCHES} | {"gflops": "GFLOP/s"}
    table = Table("Convolutions on a CPU, time over PyTorch's", columns, rows)
    configuration = {"model": str(CrevNetConfig()), "batches": BATCHES, "rounds": ROUNDS, "threads": 1}
    complete = len(rows) == len(shapes())
    title = "Convolutions on a CPU"
    publish(Report("convolution", title, {"rows": table}, configuration, NOTES, complete=complete, page=PAGE))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every shape; where the sweep is left out, no model is built to find them."""
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", shapes() if metafunc.config.getoption("--sweeps") else (), ids=str)


def test_beside_pytorch(benchmark, results, shape):
    inputs, outputs, k, size = shape
    row: dict[str, Any] = {"convolution": f"{inputs} -> {outputs}, {k}^3, {' x '.join(map(str, size))}"}
    row["number"] = shapes()[shape]

    def measure_all() -> None:
        for batch in BATCHES:
            x, grad = torch.randn(batch, inputs, *size).requires_grad_(), torch.randn(batch, outputs, *size)
            weight = torch.randn(outputs, inputs, k, k, k).requires_grad_()
            bias = torch.randn(outputs).requires_grad_()
            leaves = (x, weight, bias)

            def ours(leaves: tuple[Tensor, ...] = leaves) -> Tensor:
                found = convolve(*leaves)
                return theirs(leaves) if found is None else found

            def theirs(leaves: tuple[Tensor, ...] = leaves) -> Tensor:
                return F.conv3d(*leaves, padding=k // 2)

            def both(way: Callable[[], Tensor], leaves: tuple[Tensor, ...] = leaves, grad: Tensor = grad) -> None:
                torch.autograd.grad(way(), leaves, grad)

            repeat = 1 + int(SECONDS / measured(lambda: both(theirs), 3))
            rounds = []
            for i in range(ROUNDS):
                times = {
                    way: measured(lambda w=way: both(w), repeat) for way in ((ours, theirs), (theirs, ours))[i % 2]
                }
                rounds.append(times)
            row[f"ratio_{batch}"] = spread([times[ours] / times[theirs] for times in rounds])["median"]
            flops = 6 * grad[0, 0].numel() * inputs * outputs * k**3 * batch
            row["gflops"] = flops / spread([times[ours] for times in rounds])["median"] / 1e9

    benchmark.pedantic(measure_all, rounds=1)
    if not benchmark.disabled:
        results.append(row)


def measured(call: Callable[[], None], repeat: int) -> float:
    """Processor time of a call."""
    start = time.process_time()
    for _ in range(repeat):
        call()
    return (time.process_time() - start) / repeat
