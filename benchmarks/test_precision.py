"""A training step of the paper's CrevNet in mixed precision on a CPU: `pytest benchmarks/test_precision.py
--benchmark-only --sweeps`.

Under the autocast of `python -m crevnet.train --run.precision bf16-mixed`. All ways have the same weights and take
turns in one process.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.reporting import Report, Table, spread
from benchmarks.timing import processor_seconds, rotated
from benchmarks.training import CELLS, Variant, random_clips
from crevnet.convolution import use_channels_last
from crevnet.launch import Autocast
from crevnet.model import CrevNetConfig
from revgrad import LiveMemory

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("one_thread")]

STEPS = 4
ROUNDS = {4: 4, 16: 3}
VARIANTS = (Variant("stored", "float"), Variant("reversible", "float"), Variant("reversible"))
PRECISIONS = {"32-true": nullcontext, "bf16-mixed": Autocast("bf16-mixed", "cpu").forward_context}
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"

NOTES = (
    f"Forward pass with teacher forcing, mean squared error, backward pass; {STEPS} time steps of the paper's Moving "
    "MNIST configuration, one thread; random weights and frames. Without the optimiser.",
    "Over float32: time over that of the same way in float32, median over the rounds, each of which runs all once.",
    "Error: that of the gradient of all weights, relative to stored training in float32. MB: peak of live tensor bytes "
    "of the step, all sequences of the batch.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    columns = {"cell": "cell", "batch": "batch", "variant": "variant", "ms": "ms per sequence and time step"}
    columns |= {"ratio": "over float32", "p20": "p20", "p80": "p80", "error": "error", "mb": "MB", "mb32": "in float32"}
    tables = {"rows": Table("A training step in bfloat16 on a CPU", columns, rows, formats={"error": ".1e"})}
    configuration = {"model": str(CrevNetConfig()), "steps": STEPS, "rounds": ROUNDS, "threads": 1}
    complete = len(rows) == len(CELLS) * len(ROUNDS) * len(VARIANTS)
    publish(Report("precision", "Mixed precision", tables, configuration, NOTES, complete=complete, page=PAGE))


@pytest.mark.parametrize("batch", ROUNDS)
@pytest.mark.parametrize("cell", CELLS)
def test_beside_float32(benchmark, results, cell, batch):
    torch.manual_seed(0)
    config = CrevNetConfig(cell=cell)
    model, clips = config.build(), random_clips(config, batch, STEPS)
    use_channels_last(model)

    def stepping(variant: Variant, precision: str) -> Callable[[], None]:
        def step() -> None:
            model.config = variant.of(config)
            with PRECISIONS[precision]():
                loss = model.loss(clips)
            loss.backward()

        return step

    steps = {(v, precision): stepping(v, precision) for v in VARIANTS for precision in PRECISIONS}
    names, rounds = list(steps), []

    def run_round() -> None:
        rounds.append({name: processor_seconds(steps[name]) for name in rotated(names, len(rounds))})

    benchmark.pedantic(run_round, rounds=ROUNDS[batch], warmup_rounds=1)
    if benchmark.disabled:
        return
    rounds = rounds[-ROUNDS[batch] :]

    def measured(variant: Variant, precision: str) -> tuple[Tensor, float]:
        """The gradient of all weights, and the peak of memory in MB."""
        model.zero_grad()
        with LiveMemory() as memory:
            steps[variant, precision]()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat(gradients), memory.peak / 1e6

    wanted, _ = measured(VARIANTS[0], "32-true")
    for variant in VARIANTS:
        found, mb = measured(variant, "bf16-mixed")
        _, mb32 = measured(variant, "32-true")
        ratio = spread([times[variant, "bf16-mixed"] / times[variant, "32-true"] for times in rounds])
        row = {
            "cell": cell,
            "batch": batch,
            "variant": str(variant),
            "ms": 1e3 / batch / STEPS * spread([times[variant, "bf16-mixed"] for times in rounds])["median"],
            "ratio": ratio["median"],
            "p20": ratio["p20"],
            "p80": ratio["p80"],
            "error": float((found - wanted).norm() / wanted.norm()),
            "mb": mb,
            "mb32": mb32,
        }
        results.append(row)
