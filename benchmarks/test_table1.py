"""Table 1 of the paper: `pytest benchmarks/test_table1.py --benchmark-only`.

FLOPs per frame and training memory of all eight systems, counted on the real models, beside the paper's figures. Counts
do not depend on the machine, but for what CrevNet's convolutions on a CPU take with other instructions: half a percent
between AVX2 and AVX-512. Those that the paper's configuration determines are asserted.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.memory import training_peak
from benchmarks.pictures import flops_against_memory, memory_of_systems
from benchmarks.reporting import Report, Table
from benchmarks.table1 import (
    PATCHED,
    SYSTEMS,
    System,
    activations_mb,
    allocated_mb,
    count_ahead,
    fake,
    gflops_per_frame,
    parameters,
    per_sample_mb,
    training_mb,
)
from benchmarks.training import STEPS, Variant
from crevnet.model import CrevNetConfig
from crevnet.video_model import VideoConfig

REVERSIBLE, CHECKPOINT = Variant("reversible"), Variant("checkpoint", "float")
REPRODUCED = ("ConvLSTM", "VPN", "PredRNN", "CrevNet+ConvLSTM", "CrevNet+ST-LSTM")
"""Whose FLOPs the paper's configuration gives."""
FRAMES = (5, 20)
TIMES = (1, 2)
DEPTH_STEPS = 4

NOTES = (
    "GFLOPs of the convolutions that predict one frame of 64 x 64 pixels, one channel, batch 1; FLOPs are twice the "
    "multiply-accumulates. The paper counts the baselines on whole frames, not on the 4 x 4 patches that their public "
    "code trains with.",
    f"MB per sample: peak of live tensor bytes of a training step of {STEPS} time steps (for CrevNet 22 frames in "
    "clips of three, where training on 20 frames takes 17 steps), batch 2 minus batch 1, as in training_memory.md; "
    "1 MB is 10^6 bytes. All: weights, gradients, Adam's moments and the activations of one sample. Stored and "
    "checkpointed in float arithmetic, reversible in exact arithmetic. Against the length, n frames are n - 1 time "
    "steps, which for CrevNet are n + 2 frames.",
    "The paper does not say how it measured memory, nor with which batch and framework: its column is printed, not "
    "reproduced. Ours counts every tensor that PyTorch's autograd keeps; frameworks that fuse or recompute "
    "pointwise operators keep fewer, caching allocators reserve more.",
    "Checkpoint: `torch.utils.checkpoint` around every time step, what one would do without this library.",
    "Baselines are counted under fake tensors, which have storages but no values; real ones give the same bytes "
    "(asserted) without oneDNN, whose convolutions on a CPU take temporaries of their own.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[dict[str, list[dict[str, Any]]]]:
    rows: dict[str, list[dict[str, Any]]] = {"rows": [], "patched": [], "frames": [], "depth": []}
    yield rows
    count = len(SYSTEMS)
    expected = count, len(PATCHED), (count + 2) * len(FRAMES), (count + 2) * len(TIMES)
    complete = tuple(map(len, rows.values())) == expected
    tables = {
        "rows": Table(
            "Table 1: FLOPs per frame and training memory per sample",
            {
                "system": "system",
                "paper_gflops": "GFLOPs, paper",
                "gflops_per_frame": "measured",
                "gflops_ratio": "ratio",
                "paper_mb": "MB, paper",
                "stored_mb_per_sample": "stored",
                "checkpoint_mb_per_sample": "checkpoint",
                "reversible_mb_per_sample": "reversible",
                "mb_ratio": "ratio",
                "total_mb_one_sample": "all, MB",
                "parameters_millions": "M weights",
            },
            rows["rows"],
        ),
        "patched": Table(
            "As people train them: frames folded into patches of 4 x 4 pixels",
            {
                "system": "system",
                "gflops_per_frame": "GFLOPs",
                "over_crevnet": "over CrevNet+ST-LSTM",
            },
            rows["patched"],
        ),
        "frames": Table(
            "Memory of one more sample against the length of the sequence",
            {"system": "system", "mode": "mode", "frames": "frames", "mb": "MB per sample"},
            rows["frames"],
        ),
        "depth": Table(
            f"Memory of one more sample against depth, {DEPTH_STEPS} time steps",
            {"system": "system", "mode": "mode", "times": "times as deep", "mb": "MB per sample"},
            rows["depth"],
        ),
    }
    notes = (*NOTES, *(f"{s.name}: {s.source}. {s.remark}" for s in SYSTEMS))
    configuration = {s.name: str(s.config) for s in SYSTEMS} | {"steps": STEPS, "dtype": "float32"}
    pictures = {}
    if complete:
        pictures["table1_flops_against_memory.png"] = flops_against_memory(rows["rows"])
        pictures["table1_memory.png"] = memory_of_systems(rows["frames"], rows["depth"])
    publish(Report("table1", "Table 1", tables, configuration, notes, pictures, complete))


def test_activations(benchmark):
    """First, in parallel, what the others read."""
    benchmark.pedantic(count_ahead, (activations_of_all(),), rounds=1)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_system(benchmark, results, system):
    row = benchmark.pedantic(measured, (system,), rounds=1)
    results["rows"].append(row)
    if system.name in REPRODUCED:
        assert row["gflops_per_frame"] == pytest.approx(system.paper_gflops, rel=0.02)


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s.name in PATCHED], ids=lambda s: s.name)
def test_patched(benchmark, results, system):
    config = replace(system.config, patch=4)
    gflops = benchmark.pedantic(gflops_per_frame, (config,), rounds=1)
    row = {
        "system": system.name,
        "setting": str(config),
        "gflops_per_frame": gflops,
        "over_crevnet": gflops / gflops_per_frame(SYSTEMS[-1].config),
    }
    results["patched"].append(row)
    assert row["over_crevnet"] > 1


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_growth(benchmark, results, system):
    benchmark.pedantic(grow, (system, results), rounds=1)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_fake_tensors_count_what_real_ones_do(benchmark, system):
    small = replace(system.config, image_size=32 if isinstance(system.config, CrevNetConfig) else 16)
    with torch.backends.mkldnn.flags(enabled=False):  # the CPU's own convolutions take other temporaries
        real = benchmark.pedantic(training_peak, (small, 1, 2), rounds=1, warmup_rounds=1)
    with fake():
        assert training_peak(small, 1, 2) == real


def ways_of(system: System) -> dict[str, Callable[[VideoConfig], VideoConfig]]:
    """Ways to train a system whose memory grows differently."""
    ways: dict[str, Callable[[VideoConfig], VideoConfig]] = {"stored": lambda config: config}
    return ways | ({"reversible": REVERSIBLE.of} if isinstance(system.config, CrevNetConfig) else {})


def activations_of_all() -> list[tuple[VideoConfig, int, int]]:
    """Every configuration, batch and number of time steps whose activations are counted; the longest first."""
    found = []
    for system in reversed(SYSTEMS):
        if isinstance(system.config, CrevNetConfig):
            found.append((CHECKPOINT.of(system.config), STEPS))
        for of in ways_of(system).values():
            found += [(of(system.config), frames - 1) for frames in FRAMES]
            found += [(of(system.deeper(times)), DEPTH_STEPS) for times in TIMES]
    unique = {(str(config), steps): (config, steps) for config, steps in found}.values()
    return [(config, batch, steps) for config, steps in sorted(unique, key=lambda x: -x[1]) for batch in (2, 1)]


def measured(system: System) -> dict[str, Any]:
    """A row of the table."""
    config, ours = system.config, isinstance(system.config, CrevNetConfig)
    gflops = gflops_per_frame(config)
    stored = per_sample_mb(config)
    reversible = per_sample_mb(REVERSIBLE.of(config)) if ours else None
    checkpoint = per_sample_mb(CHECKPOINT.of(config)) if ours else None
    return {
        "system": system.name,
        "setting": str(config),
        "source": system.source,
        "gflops_per_frame": gflops,
        "paper_gflops": system.paper_gflops,
        "gflops_ratio": gflops / system.paper_gflops,
        "stored_mb_per_sample": stored,
        "checkpoint_mb_per_sample": checkpoint,
        "reversible_mb_per_sample": reversible,
        "paper_mb": system.paper_mb,
        "mb_ratio": (reversible or stored) / system.paper_mb,
        "total_mb_one_sample": training_mb(config, activations_mb(REVERSIBLE.of(config) if ours else config, 1)),
        "stored_total_mb_one_sample": training_mb(config, activations_mb(config, 1)),
        "cuda_allocator_mb_per_sample": allocated_mb(config),
        "parameters": parameters(config),
        "parameters_millions": parameters(config) / 1e6,
    }


def grow(system: System, results: dict[str, list[dict[str, Any]]]) -> None:
    """Count a system's memory with more frames and deeper; CrevNet's reversible as well."""
    for mode, of in ways_of(system).items():
        for frames in FRAMES:
            mb = per_sample_mb(of(system.config), frames - 1)
            results["frames"].append({"system": system.name, "mode": mode, "frames": frames, "mb": mb})
        for times in TIMES:
            mb = per_sample_mb(of(system.deeper(times)), DEPTH_STEPS)
            results["depth"].append({"system": system.name, "mode": mode, "times": times, "mb": mb})
