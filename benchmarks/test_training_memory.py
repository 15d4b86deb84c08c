"""Memory of a training step: `pytest benchmarks/test_training_memory.py --benchmark-only --sweeps`.

What one more sample takes in live tensor bytes, and how that grows with the number of predictive modules and
with the depth of the autoencoder. These are counts, not times: they are asserted.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import memory
from benchmarks.pictures import memory_against_depth, memory_frontier
from benchmarks.reporting import Report, Table
from benchmarks.training import CELLS, STEPS, Variant
from crevnet.model import CrevNetConfig

pytestmark = pytest.mark.sweep

DEPTH_STEPS = 4
"""Fewer for the growth with depth, where it is the slope that counts."""

REVERSIBLE, CHECKPOINT, STORED = (Variant(mode) for mode in ("reversible", "checkpoint", "stored"))
SPARSE = Variant("reversible", keep_states_every=4)
INVERTED = Variant("reversible", cell_states="inverted")
SPARSE_INVERTED = Variant("reversible", keep_states_every=4, cell_states="inverted")
VARIANTS = (
    REVERSIBLE,
    SPARSE,
    INVERTED,
    SPARSE_INVERTED,
    Variant("reversible", clips_at_once=STEPS),
    Variant("reversible", "float"),
    CHECKPOINT,
    Variant("checkpoint", "float"),
    STORED,
    Variant("stored", "float"),
)
BOUNDS = {
    ("stlstm", REVERSIBLE): 14,
    ("convlstm", REVERSIBLE): 10,
    ("stlstm", SPARSE): 8,
    ("convlstm", SPARSE): 6,
    ("stlstm", INVERTED): 11,
    ("convlstm", INVERTED): 7,
}
"""MB per sample."""
FRONTIER = {
    STORED: "stored",
    CHECKPOINT: "torch.utils.checkpoint",
    REVERSIBLE: "reversible",
    INVERTED: "cells inverted",
    SPARSE: "every 4th state",
    SPARSE_INVERTED: "both",
}
"""What the frontier of memory and FLOPs shows, in exact arithmetic. Of 19 states every fourth is also every root."""

MODULES = (4, 8, 16, 32)
BLOCKS = ((4, 5, 3), (8, 10, 6), (16, 20, 12))
PAPER = CrevNetConfig()
WORKING_SET = 0.8
"""MB per sample for the graph of the one layer that is being differentiated."""

NOTES = (
    "MB per sample: peak of live tensor bytes from the start of the forward to the end of the backward pass, "
    "batch 2 minus batch 1. Weights, their gradients and the input frames exist before and do not count. "
    "1 MB is 10^6 bytes.",
    f"Paper's Moving MNIST configuration (float32, 3D clips, {STEPS} time steps), random weights and frames, "
    "cycle collector off.",
    "States and predictions (with their gradients) follow from the configuration; residue is counted on the "
    "forward pass. The rest is what was measured beyond them: the graph of the one layer that is being "
    "differentiated, or the gradients of one step's states, whichever is larger.",
    "The states before the first step are one tensor of zeros; counted as full states, states are 11.2 and 7.5 MB.",
    "Table 1 of the paper gives 195 MB with ST-LSTM and 130 MB with ConvLSTM.",
    "FLOPs are those of matrix products and convolutions in a training step of one sample, over those of stored "
    "autograd: inverting cells adds none to the 4/3 of the reversible step.",
    f"Growth with depth: ST-LSTM, {DEPTH_STEPS} time steps, exact arithmetic.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[dict[str, list[dict[str, Any]]]]:
    rows: dict[str, list[dict[str, Any]]] = {"training_step": [], "modules": [], "blocks": []}
    yield rows
    expected = len(CELLS) * len(VARIANTS), 3 * len(MODULES), 3 * len(BLOCKS)
    complete = tuple(map(len, rows.values())) == expected
    total = {"mb_per_sample": "MB per sample"}
    flops = {"flops_over_stored": "FLOPs over stored"}
    parts = {
        "states_mb": "states",
        "predictions_mb": "predictions",
        "residue_mb": "residue",
        "rest_mb": "rest",
    }
    tables = {
        "training_step": Table(
            f"Training step of the paper's configuration, {STEPS} time steps",
            {"cell": "cell", "variant": "variant"} | total | {"bound_mb": "bound"} | flops | parts,
            rows["training_step"],
        ),
        "modules": Table(
            "Against the number of predictive modules",
            {"modules": "modules", "mode": "mode"} | total | parts,
            rows["modules"],
        ),
        "blocks": Table(
            "Against the number of autoencoder blocks",
            {"blocks": "blocks", "mode": "mode"} | total | parts,
            rows["blocks"],
        ),
    }
    configuration = {
        "model": str(PAPER),
        "dtype": "float32",
        "batch": "2 minus 1",
        "steps": STEPS,
        "steps_against_depth": DEPTH_STEPS,
        "cells": CELLS,
        "modules": MODULES,
        "blocks": BLOCKS,
        "cell_against_depth": PAPER.cell,
    }
    pictures = {}
    subtitle = f"CrevNet with ST-LSTM, 64 x 64 pixels, {DEPTH_STEPS} time steps, same weights in all three modes"
    if complete:
        labels = {str(variant): label for variant, label in FRONTIER.items()}
        frontier = [r | {"label": labels[r["variant"]]} for r in rows["training_step"] if r["variant"] in labels]
        pictures["memory_frontier.png"] = memory_frontier(
            frontier, f"CrevNet, 64 x 64 pixels, {STEPS} time steps, exact arithmetic, same weights"
        )
        pictures["memory_against_depth.png"] = memory_against_depth(rows["modules"], rows["blocks"], subtitle)
    publish(Report("training_memory", "Training memory", tables, configuration, NOTES, pictures, complete))


def measured(cell: str, variant: Variant, steps: int, modules: int, blocks: tuple[int, ...]) -> dict[str, float]:
    """Memory per sample, and for reversible training what it consists of."""
    total = memory.marginal_mb(cell, modules, blocks, variant, steps)
    row: dict[str, float] = {"mb_per_sample": total}
    if variant.mode == "reversible":
        config = variant.of(CrevNetConfig(cell=cell, modules=modules, blocks=blocks))
        row |= {
            "states_mb": memory.states_mb(config, steps),
            "predictions_mb": memory.predictions_mb(config, steps),
            "residue_mb": memory.residue_mb(config, steps),
        }
        row["rest_mb"] = total - sum(row[key] for key in ("states_mb", "predictions_mb", "residue_mb"))
    return row


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_training_step(benchmark, results, cell, variant):
    row = once(benchmark, measured, cell, variant, STEPS, PAPER.modules, PAPER.blocks)
    bound = BOUNDS.get((cell, variant))
    row["flops_over_stored"] = memory.flops(cell, variant, STEPS) / memory.flops(cell, STORED, STEPS)
    results["training_step"].append({"cell": cell, "variant": str(variant), "bound_mb": bound, **row})
    if bound is not None:
        assert row["mb_per_sample"] <= bound
    if variant == INVERTED:
        assert memory.flops(cell, INVERTED, STEPS) == memory.flops(cell, REVERSIBLE, STEPS)


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("cell", CELLS)
def test_reversible_needs_less_than_checkpoints(benchmark, cell, arithmetic):
    reversible, checkpoint = once(
        benchmark,
        lambda: [
            memory.marginal_mb(cell, PAPER.modules, PAPER.blocks, variant, STEPS)
            for variant in (REVERSIBLE, Variant("checkpoint", arithmetic))
        ],
    )
    assert reversible < checkpoint


@pytest.mark.parametrize("variant", [STORED, CHECKPOINT, REVERSIBLE], ids=str)
@pytest.mark.parametrize("modules", MODULES)
def test_against_modules(benchmark, results, modules, variant):
    row = once(benchmark, measured, PAPER.cell, variant, DEPTH_STEPS, modules, PAPER.blocks)
    results["modules"].append({"modules": modules, "mode": variant.mode, **row})
    if variant is REVERSIBLE:
        assert 0 <= row["rest_mb"] <= rest_bound(modules)


@pytest.mark.parametrize("variant", [STORED, CHECKPOINT, REVERSIBLE], ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_against_blocks(benchmark, results, blocks, variant):
    row = once(benchmark, measured, PAPER.cell, variant, DEPTH_STEPS, PAPER.modules, blocks)
    results["blocks"].append({"blocks": sum(blocks), "mode": variant.mode, **row})
    if variant is REVERSIBLE:
        assert 0 <= row["rest_mb"] <= rest_bound(PAPER.modules)


def rest_bound(modules: int) -> float:
    """MB per sample that a reversible step may hold beyond states, predictions, their gradients and residue."""
    return max(WORKING_SET, memory.state_gradients_mb(CrevNetConfig(modules=modules)))


def once(benchmark, function, *arguments):
    """Run a function that counts rather than times; pytest-benchmark shows how long the counting took."""
    value = benchmark.pedantic(function, arguments, rounds=1)
    benchmark.extra_info["result"] = value
    return value
