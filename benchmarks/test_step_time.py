"""Time of a training step, reversible over stored: `pytest benchmarks/test_step_time.py --benchmark-only --sweeps`.

Every round runs one step of each variant, with the same weights and frames in the same process, and gives one
ratio; so what slows the machine down for a while slows both sides. Nothing is asserted: the table says
whether the target was met.
"""

import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.reporting import Report, Table, spread
from benchmarks.training import CELLS, Variant, random_clips, training_step
from crevnet.model import CrevNet, CrevNetConfig

pytestmark = pytest.mark.sweep

STEPS = 4
"""Fewer than the paper's 19: both sides of a ratio grow alike."""
BATCHES = (1, 4)
"""The paper trains with 16. With one sequence the overhead per operator, which grows with no batch, weighs most."""
ROUNDS = 6
TARGET = 1.40

STORED, STORED_FLOAT = Variant("stored"), Variant("stored", "float")
REVERSIBLE, REVERSIBLE_FLOAT = Variant("reversible"), Variant("reversible", "float")
SPARSE = Variant("reversible", keep_states_every=4)
CHECKPOINT = Variant("checkpoint")
VARIANTS = (STORED, STORED_FLOAT, REVERSIBLE, REVERSIBLE_FLOAT, SPARSE, CHECKPOINT)
RATIOS = (
    (REVERSIBLE, STORED, TARGET),
    (REVERSIBLE_FLOAT, STORED_FLOAT, TARGET),
    (REVERSIBLE, STORED_FLOAT, None),
    (SPARSE, STORED, None),
    (CHECKPOINT, STORED, None),
)
"""What is divided by what, and the target. The third is the price of reversibility and exactness together."""

NOTES = (
    "One step is forward, mean squared error and backward, without the optimiser.",
    f"Paper's Moving MNIST configuration, but smaller batches and {STEPS} time steps; random weights and frames.",
    f"Ratios are taken within each of {ROUNDS} rounds, whose order rotates; p20, median and p80 over the rounds.",
    "One evaluation of each transform in the backward pass makes 4/3 = 1.33 in operations.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[dict[str, list[dict[str, Any]]]]:
    rows: dict[str, list[dict[str, Any]]] = {"ratios": [], "seconds": []}
    yield rows
    quantiles = {"p20": "p20", "median": "median", "p80": "p80"}
    tables = {
        "ratios": Table(
            "Step time as a multiple",
            {"cell": "cell", "batch": "batch", "variant": "variant", "over": "over"}
            | quantiles
            | {"target": "target", "outcome": "outcome"},
            rows["ratios"],
        ),
        "seconds": Table(
            "Step time in seconds",
            {"cell": "cell", "batch": "batch", "variant": "variant"} | quantiles,
            rows["seconds"],
            decimals=3,
        ),
    }
    configuration = {
        "model": str(CrevNetConfig()),
        "dtype": "float32",
        "cells": CELLS,
        "batches": BATCHES,
        "steps": STEPS,
        "rounds": ROUNDS,
    }
    complete = len(rows["ratios"]) == len(CELLS) * len(BATCHES) * len(RATIOS)
    publish(Report("step_time", "Step time", tables, configuration, NOTES, complete=complete))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("cell", CELLS)
def test_step_time(benchmark, results, cell, batch):
    torch.manual_seed(0)
    config = CrevNetConfig(cell=cell)
    model, clips = config.build(), random_clips(config, batch, STEPS)
    rounds: list[dict[Variant, float]] = []

    def run_round() -> None:
        shift = len(rounds) % len(VARIANTS)
        order = VARIANTS[shift:] + VARIANTS[:shift]
        rounds.append({variant: step_seconds(model, variant, clips) for variant in order})

    benchmark.pedantic(run_round, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.disabled:
        return
    timed = rounds[1:]
    for variant in VARIANTS:
        seconds = [times[variant] for times in timed]
        results["seconds"].append(
            {"cell": cell, "batch": batch, "variant": str(variant), **spread(seconds), "rounds": seconds}
        )
    for variant, over, target in RATIOS:
        ratio = spread([times[variant] / times[over] for times in timed])
        row = {"cell": cell, "batch": batch, "variant": str(variant), "over": str(over), **ratio, "target": target}
        row["outcome"] = None if target is None else "met" if ratio["median"] <= target else "MISSED"
        results["ratios"].append(row)
        benchmark.extra_info[f"{variant} / {over}"] = ratio


def step_seconds(model: CrevNet, variant: Variant, clips: torch.Tensor) -> float:
    """Time of one training step; what was left by the one before is cleared away outside the clock."""
    model.config = variant.of(model.config)
    model.zero_grad(set_to_none=True)
    gc.collect()
    start = time.perf_counter()
    training_step(model, clips)
    return time.perf_counter() - start
