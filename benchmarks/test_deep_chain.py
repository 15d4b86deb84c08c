"""A thousand layers: `pytest benchmarks/test_deep_chain.py --benchmark-only`.

Exact chains of 10, 100 and 1000 couplings beside stored autograd on the same rounded streams: equal gradients, bit for
bit, from memory that does not grow.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.reporting import Report, Table
from revgrad import AdditiveCoupling, LiveMemory, ReversibleSequential

pytestmark = pytest.mark.usefixtures("one_thread")

DEPTHS = (10, 100, 1000)
BATCH, WIDTH = 256, 16

NOTES = (
    f"Additive couplings of two streams of {BATCH} x {WIDTH} in exact arithmetic, a linear layer and a tanh each; "
    "float32 on a CPU, one thread.",
    "Peak: most bytes of tensors alive in a training step. Weights, their gradients, and the input with its gradient "
    "exist before and do not count. 1 KiB is 2^10 bytes.",
    "Equal: outputs, and gradients of the input and all weights, are the same bits as with mode='stored'.",
)
COLUMNS = {"depth": "layers", "peak_kib": "peak, KiB", "stored_kib": "stored, KiB", "equal": "equal"}


class Bounded(nn.Module):
    """Messages small enough for a thousand of them to stay on the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, W]` to the same."""
        return torch.tanh(self.linear(x)) / 16


@pytest.fixture(scope="module")
def results(publish) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    table = Table("Exact chains, however deep", COLUMNS, rows, decimals=1)
    configuration = {"depths": DEPTHS, "batch": BATCH, "width": WIDTH}
    complete = len(rows) == len(DEPTHS)
    publish(Report("deep_chain", "A thousand layers", {"rows": table}, configuration, NOTES, complete=complete))
    if complete:
        assert len({row["peak_kib"] for row in rows}) == 1


@pytest.mark.parametrize("depth", DEPTHS)
def test_depth(benchmark, results, depth):
    torch.manual_seed(0)
    chain = ReversibleSequential(
        *(AdditiveCoupling(Bounded(), i % 2, 1 - i % 2) for i in range(depth)), arithmetic="exact"
    )
    streams = tuple(torch.randn(BATCH, WIDTH).requires_grad_() for _ in range(2))
    train(chain, streams)  # what is made once
    peak, found = benchmark.pedantic(train, (chain, streams), rounds=1)
    chain.mode = "stored"
    stored_peak, expected = train(chain, streams)
    equal = all(map(torch.equal, found, expected))
    assert equal
    assert all(bool(x.any()) for x in found)
    results.append({"depth": depth, "peak_kib": peak / 1024, "stored_kib": stored_peak / 1024, "equal": "yes"})


def train(chain: ReversibleSequential, streams: tuple[Tensor, ...]) -> tuple[int, list[Tensor]]:
    """Peak bytes of a training step, and outputs and gradients."""
    leaves = [*streams, *chain.parameters()]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    with LiveMemory() as memory:
        outputs = chain(*streams)
        torch.stack([(y * y).mean() for y in outputs]).sum().backward()
        peak = memory.peak
    return peak, [*(y.detach() for y in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
