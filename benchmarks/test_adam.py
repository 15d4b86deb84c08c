"""Adam's step on the paper's CrevNet, fused and not: `pytest benchmarks/test_adam.py --benchmark-only --sweeps`.

All ways take turns in one process, each on weights of its own.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.reporting import Report, Table, spread
from benchmarks.timing import processor_seconds, rotated
from benchmarks.training import CELLS
from crevnet.adam import adam
from crevnet.convolution import use_channels_last
from crevnet.model import CrevNetConfig
from revgrad import LiveMemory

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("one_thread")]

ROUNDS = 20
BETAS = (0.9, 0.999)
PLAIN, FUSED = "one weight at a time", "fused, as CrevNet is trained"
WAYS: dict[str, Callable[..., torch.optim.Adam]] = {
    PLAIN: lambda weights: torch.optim.Adam(weights, 1e-4, BETAS, foreach=False),
    "all weights at once (foreach)": lambda weights: torch.optim.Adam(weights, 1e-4, BETAS, foreach=True),
    FUSED: lambda weights: adam(weights, 1e-4, BETAS),
}
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"

NOTES = (
    "The paper's Moving MNIST configuration, float32, one thread; random gradients, laid out like their weights. Over "
    "one at a time: median over the rounds, each of which makes one step in every way.",
    "MB: peak of live tensor bytes of a step besides weights, gradients and moments.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    columns = {"cell": "cell", "way": "way", "ms": "ms", "ratio": "over one at a time", "p20": "p20", "p80": "p80"}
    tables = {"rows": Table("Adam's step on a CPU", columns | {"mb": "MB"}, rows)}
    configuration = {"model": str(CrevNetConfig()), "rounds": ROUNDS, "dtype": "float32", "threads": 1}
    complete = len(rows) == len(CELLS) * len(WAYS)
    publish(Report("adam", "Adam", tables, configuration, NOTES, complete=complete, page=PAGE))


@pytest.mark.parametrize("cell", CELLS)
def test_step(benchmark, results, cell):
    optimisers = {way: make(trained(cell)) for way, make in WAYS.items()}
    rounds: list[dict[str, float]] = []

    def run_round() -> None:
        rounds.append({way: processor_seconds(optimisers[way].step) for way in rotated(list(WAYS), len(rounds))})

    benchmark.pedantic(run_round, rounds=ROUNDS, warmup_rounds=1)  # the warm-up makes the moments
    if benchmark.disabled:
        return
    rounds = rounds[-ROUNDS:]
    for way, optimiser in optimisers.items():
        with LiveMemory() as memory:
            optimiser.step()
        ratio = spread([times[way] / times[PLAIN] for times in rounds])
        row = {
            "cell": cell,
            "way": way,
            "ms": 1e3 * spread([times[way] for times in rounds])["median"],
            "ratio": ratio["median"],
            "p20": ratio["p20"],
            "p80": ratio["p80"],
            "mb": memory.peak / 1e6,
        }
        results.append(row)


def trained(cell: str) -> list[torch.nn.Parameter]:
    """Weights with gradients, laid out as the trainer does it."""
    torch.manual_seed(0)
    model = CrevNetConfig(cell=cell).build()
    use_channels_last(model)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    return list(model.parameters())
