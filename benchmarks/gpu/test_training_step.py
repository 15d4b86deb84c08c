"""Training steps on a GPU: `pytest benchmarks/gpu/test_training_step.py --benchmark-only`.

The paper's CrevNet on Moving MNIST in every mode, with the kernels and with plain PyTorch in their place, in float32
and under bfloat16 autocast, and four baselines of table 1: those whose public code trains on patches of 4 x 4 pixels.
Every round runs one step of each variant with the same weights and frames in the same process. Nothing is asserted.
Every batch of a system is written when it has been measured, and is added to those that were measured before: `-k
"[stlstm-16]"`, `-k "convlstm and crevnet"`, `-k baselines`.
"""

import gc
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from revgrad_kernels import backend
from torch import Tensor, nn

from benchmarks.gpu.pieces import joined
from benchmarks.gpu.timing import timed
from benchmarks.memory import MB
from benchmarks.reporting import Report, Table, spread
from benchmarks.table1 import PATCHED, SYSTEMS
from benchmarks.timing import ratios, rotated
from benchmarks.training import CELLS, STEPS, Variant, random_clips
from crevnet.capture import captured, side_stream
from crevnet.convolution import use_channels_last
from crevnet.model import CrevNetConfig
from crevnet.video_model import VideoConfig, VideoModel
from revgrad import DeferredChecks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BATCHES = (1, 16, 64, 256)
ROUNDS = 3
STORED, EXACT = Variant("stored", "float"), Variant("reversible")
OFFLOADED = Variant("reversible", offload=True)
AT_ONCE = replace(STORED, clips_at_once=STEPS), replace(EXACT, clips_at_once=STEPS)
MODES = (
    *(STORED, Variant("checkpoint", "float"), Variant("reversible", "float"), Variant("stored"), EXACT, OFFLOADED),
    *AT_ONCE,
)
PRECISIONS = ("float32", "bfloat16")
BASELINES = "baselines"
PATCH = 4
KEYS = ("system", "batch", "variant", "kernels", "precision", "weights", "launched")
"""What tells a row from every other one."""

NOTES = (
    f"Forward pass with teacher forcing, mean squared error and backward pass of {STEPS} time steps; without the "
    "optimiser. Random weights and frames of 64 x 64 pixels.",
    f"Wall-clock seconds until the device is done: median, p20 and p80 of {ROUNDS} rounds, in each of which every "
    "variant of a cell and batch runs once, in rotating order. Ratios are taken within a round.",
    "Kernels: `triton`, or `plain` PyTorch in their place. Precision: float32 as PyTorch has it by default (cuDNN may "
    "use TF32), or bfloat16 autocast of the forward pass, the streams staying in float32. Weights: memory layout of "
    "the weights of convolutions; the trainer's is channels-last.",
    "`offload`: recurrent states wait in pinned host memory between forward and backward pass.",
    "`over stored` is over the stored step of the same arithmetic, kernels, precision and weights; `plain over it` is "
    "the same step without kernels over this one.",
    "Peak MB: the most that CUDA's allocator had given out during a step, weights and gradients included; per "
    "sequence: what a step adds to what is there before it, over the batch. 1 MB is 10^6 bytes.",
    "`launched`: operator by operator, or by replaying a CUDA graph of the step, with the engine's checks deferred and "
    "looked at after the time is taken; its first replay does not count, and its peak is that of the capture. `called "
    "over it` is the same step called operator by operator over this one.",
    "Variants without numbers do not fit in the memory of the device.",
)


@dataclass(frozen=True)
class Way:
    """A way to run one training step of the same weights."""

    variant: Variant | None
    kernels: str
    precision: str
    weights: str = "channels-last"
    launched: str = "called"


def ways_of_crevnet() -> list[Way]:
    """All modes with and without kernels; the extremes with contiguous weights, and replayed from a CUDA graph."""
    usual = [Way(v, kernels, p) for v in MODES for kernels in ("triton", "plain") for p in PRECISIONS]
    extremes = ((STORED, "plain"), (EXACT, "triton"))
    usual += [Way(v, kernels, p, "contiguous") for v, kernels in extremes for p in PRECISIONS]
    replayed = (STORED, Variant("reversible", "float"), EXACT)
    return usual + [Way(v, "triton", p, launched="graph") for v in replayed for p in PRECISIONS]


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Any]]]:
    """The rows of this run, by part."""
    return {part: [] for part in (*CELLS, BASELINES)}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("cell", CELLS)
def test_crevnet(benchmark, publish, results, cell, batch):
    config = CrevNetConfig(cell=cell)
    results[cell] += benchmark.pedantic(measured, (f"CrevNet, {cell}", config, batch, ways_of_crevnet()), rounds=1)
    publish(report(cell, results[cell]))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("system", [s for s in SYSTEMS if s.name in PATCHED], ids=lambda s: f"baselines-{s.name}")
def test_baseline(benchmark, publish, results, system, batch):
    config = replace(system.config, patch=PATCH)
    ways = [Way(None, "triton", p) for p in PRECISIONS]
    results[BASELINES] += benchmark.pedantic(measured, (system.name, config, batch, ways), rounds=1)
    publish(report(BASELINES, results[BASELINES]))


def measured(name: str, config: VideoConfig, batch: int, ways: list[Way]) -> list[dict[str, Any]]:
    """A row for every way to run a step."""
    torch.manual_seed(0)
    model = config.build().cuda()
    clips = random_clips(config, batch, STEPS).cuda()
    fitting = list(ways)
    rounds: list[dict[Way, dict[str, float]]] = []
    for i in range(ROUNDS + 1):
        found = {}
        for way in rotated(fitting, i):
            step = one_step(model, clips, way)
            if step is None:
                fitting.remove(way)
            else:
                found[way] = step
        if i > 0:  # the first round is for warming up: tuning, workspaces
            rounds.append(found)
    return [row(name, batch, way, rounds, fitting) for way in ways]


def one_step(model: VideoModel, clips: Tensor, way: Way) -> dict[str, float] | None:
    """Seconds and bytes of one step; None if it does not fit."""
    if way.variant is not None:
        model.config = way.variant.of(model.config)
    lay_out(model, way.weights)
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "AUTO", "auto" if way.kernels == "triton" else "reference")
        # What the error holds is let go of when the block ends.
        with suppress(torch.OutOfMemoryError), side_stream() if way.launched == "graph" else nullcontext():
            if way.launched == "graph":
                replay, checks = replaying(model, clips, way.precision)
                seconds, _ = timed(replay)
                checks.raise_if_failed()
                del replay, checks
            else:
                seconds, _ = timed(lambda: step(model, clips, way.precision))
    if seconds is None:
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        return None
    peak = torch.cuda.max_memory_allocated()
    return {"seconds": seconds, "peak": peak, "added": peak - before}


def step(model: VideoModel, clips: Tensor, precision: str) -> None:
    """A training step as the trainer runs it: the backward pass is outside autocast."""
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
        loss = model.loss(clips)
    loss.backward()


def replaying(model: VideoModel, clips: Tensor, precision: str) -> tuple[Callable[[], None], DeferredChecks]:
    """The same from a CUDA graph, and what it checks. The peak is that of the capture from here on."""
    checks = DeferredChecks()
    with checks.measuring():
        step(model, clips, precision)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with checks:
            step(model, clips, precision)
        checks.forget()
    model.zero_grad(set_to_none=True)

    def work() -> None:
        with checks:
            step(model, clips, precision)

    replay = captured(work)
    replay()  # the first launch of a graph also brings it to the device
    return replay, checks


def lay_out(model: nn.Module, layout: str) -> None:
    """Give the weights of convolutions a memory layout."""
    if layout == "channels-last":
        use_channels_last(model)
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.data = module.weight.data.contiguous()


def row(
    name: str, batch: int, way: Way, rounds: list[dict[Way, dict[str, float]]], fitting: list[Way]
) -> dict[str, Any]:
    """What is known of one way."""
    found = {
        "system": name,
        "batch": batch,
        "variant": "stored" if way.variant is None else str(way.variant),
        "kernels": way.kernels,
        "precision": way.precision,
        "weights": way.weights,
        "launched": way.launched,
    }
    if way not in fitting:
        return found

    def values(of: Way, key: str = "seconds") -> list[float]:
        return [r[of][key] for r in rounds]

    seconds = spread(values(way))
    found |= {
        **seconds,
        "sequences_per_second": batch / seconds["median"],
        "peak_mb": max(values(way, "peak")) / MB,
        "mb_per_sequence": max(values(way, "added")) / MB / batch,
    }
    if way.variant is not None:
        stored = replace(way, variant=replace(way.variant, mode="stored", offload=False))
        plain = replace(way, kernels="plain")
        called = replace(way, launched="called")
        if way.launched == "graph" and called in fitting:
            found["called_over_it"] = spread(ratios(values(called), values(way)))["median"]
        if stored in fitting:
            found["over_stored"] = spread(ratios(values(way), values(stored)))["median"]
        if plain in fitting:
            found["plain_over_it"] = spread(ratios(values(plain), values(way)))["median"]
    return found


def report(part: str, rows: list[dict[str, Any]]) -> Report:
    """The report of one part."""
    columns = {
        "system": "system",
        "batch": "batch",
        "variant": "variant",
        "kernels": "kernels",
        "precision": "precision",
        "weights": "weights",
        "launched": "launched",
        "p20": "s, p20",
        "median": "median",
        "p80": "p80",
        "sequences_per_second": "sequences/s",
        "over_stored": "over stored",
        "plain_over_it": "plain over it",
        "called_over_it": "called over it",
        "peak_mb": "peak MB",
        "mb_per_sequence": "MB per sequence",
    }
    systems = len(PATCHED) * len(PRECISIONS) if part == BASELINES else len(ways_of_crevnet())
    configuration = {
        "model": f"table 1, patch {PATCH}" if part == BASELINES else str(CrevNetConfig(cell=part)),
        "batches": BATCHES,
        "steps": STEPS,
        "rounds": ROUNDS,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    name = f"gpu_training_step_{part}"
    rows = joined(name, "rows", rows, KEYS, configuration)
    return Report(
        name,
        f"Training step on a GPU, {part}",
        {"rows": Table("Time and memory of one training step", columns, rows, decimals=3)},
        configuration,
        NOTES,
        complete=len(rows) == systems * len(BATCHES),
        in_pieces=True,
        cuda=True,
    )
