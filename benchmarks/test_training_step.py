"""A training step of the paper's CrevNet beside plain PyTorch: `pytest benchmarks/test_training_step.py
--benchmark-only --sweeps`.

The plain model (`plain_crevnet.py`) has the same weights, a convolution per gate and nothing fused; all variants take
turns in one process. Its arithmetic is compared with the rate of a matrix product, measured in the same rounds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.launches import Launches
from benchmarks.plain_crevnet import PlainCrevNet
from benchmarks.reporting import Report, Row, Table, spread
from benchmarks.timing import FEWEST, processor_seconds, rotated
from benchmarks.training import CELLS, STEPS, Variant, random_clips
from crevnet.convolution import use_channels_last
from crevnet.model import CrevNetConfig
from revgrad import LiveMemory

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("one_thread")]

ROUNDS = {1: 6, 4: 3, 16: 3, 64: 1}
FEWER_STEPS = {64: 4}
"""Time steps of batches that would take too long with all of them."""
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
PLAIN = "plain PyTorch"
ONE_BY_ONE = (Variant("stored", "float"), Variant("reversible", "float"), Variant("reversible"))
VARIANTS = ONE_BY_ONE + tuple(replace(v, clips_at_once=STEPS) for v in ONE_BY_ONE)
ALL = "all clips at once"
SIDE = 1024
COPIED = 2**24
"""Floats that are copied to measure the bandwidth: far more than a cache holds."""


def steps_of(batch: int) -> int:
    """How many time steps a batch takes."""
    return FEWER_STEPS.get(batch, STEPS)


def name_of(variant: Variant) -> str:
    """As the table calls it."""
    return str(variant).replace(f"{STEPS} clips at once", ALL)


def rounds_in_words() -> str:
    """How many rounds there are of every batch."""
    counts = (f"{n} round{'s' if n > 1 else ''} of batch {batch}" for batch, n in ROUNDS.items())
    return ", ".join(counts)


NOTES = (
    f"Forward pass with teacher forcing, mean squared error, backward pass; {STEPS} time steps (22 frames in clips of "
    "three), the paper's Moving MNIST configuration, float32, one thread; random weights and frames. Without the "
    f"optimiser. {', '.join(f'Batch {batch} takes {n} steps' for batch, n in FEWER_STEPS.items())}, to save time.",
    "Speed-up: time of plain PyTorch over that of the variant, median over the rounds, each of which runs all once, "
    f"after one that does not count. {rounds_in_words()}; without p20 and p80 where there are fewer than {FEWEST}. "
    "Over stored: time over that of stored training with as many clips at once.",
    f"Rate: FLOPs of the convolutions in the forward and backward pass of plain PyTorch, over the time, as a fraction "
    f"of the rate of a product of two {SIDE} x {SIDE} matrices in the same round. A reversible step does 4/3 of these "
    "FLOPs; what is more than one pass is not counted.",
    "Arithmetic: these FLOPs over that rate. It is no lower bound: they are those of direct convolutions, which also "
    "multiply by the zeros around their input. Memory: the bytes that the operators of stored training read and write, "
    f"as if nothing stayed in a cache, over the bandwidth of a copy of {4 * COPIED / 2**20:.0f} MiB in the same "
    "rounds. Per sequence and time step.",
    "MB: peak of live tensor bytes of the step, all sequences of the batch; see training_memory.md for what one more "
    "sequence takes.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[dict[str, list[dict[str, Any]]]]:
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "floors": []}
    yield found
    publish(report(**found))


def report(rows: Sequence[Row], floors: Sequence[Row]) -> Report:
    """What is published."""
    rows = [row if ROUNDS[row["batch"]] >= FEWEST else {**row, "p20": None, "p80": None} for row in rows]
    columns = {"cell": "cell", "batch": "batch", "variant": "variant", "ms": "ms per sequence and time step"}
    columns |= {"speedup": "speed-up", "p20": "p20", "p80": "p80", "over_stored": "over stored", "rate": "rate"}
    columns["mb"] = "MB"
    below = {"cell": "cell", "batch": "batch", "gflop": "GFLOP", "gflops": "GFLOP/s of a matrix product"}
    below |= {"arithmetic_ms": "arithmetic, ms", "mb": "MB", "gbs": "GB/s of a copy", "memory_ms": "memory, ms"}
    below |= {"fastest": "fastest", "fastest_ms": "its ms"}
    tables = {
        "floors": Table("The arithmetic of a training step at the rate of a matrix product", below, floors),
        "rows": Table("A training step beside plain PyTorch", columns, rows),
    }
    configuration = {
        "model": str(CrevNetConfig()),
        "steps": {b: steps_of(b) for b in ROUNDS},
        "rounds": ROUNDS,
        "dtype": "float32",
        "threads": 1,
    }
    complete = len(rows) == len(CELLS) * len(ROUNDS) * (1 + len(VARIANTS))
    return Report("training_step", "Training step", tables, configuration, NOTES, complete=complete, page=PAGE)


@pytest.mark.parametrize("batch", ROUNDS)
@pytest.mark.parametrize("cell", CELLS)
def test_beside_plain_pytorch(benchmark, results, cell, batch):
    torch.manual_seed(0)
    config = CrevNetConfig(cell=cell)
    model, clips = config.build(), random_clips(config, batch, steps_of(batch))
    plain = PlainCrevNet(model)  # before, as one would write it
    use_channels_last(model)
    steps: dict[str, Callable[[], None]] = {PLAIN: lambda: plain.loss(clips).backward()}

    def stepping(variant: Variant) -> Callable[[], None]:
        def step() -> None:
            model.config = variant.of(config)
            model.loss(clips).backward()

        return step

    steps |= {name_of(variant): stepping(variant) for variant in VARIANTS}
    with FlopCounterMode(display=False) as counter:
        steps[PLAIN]()
    names, rounds = list(steps), []

    def run_round() -> None:
        times = {name: processor_seconds(steps[name]) for name in rotated(names, len(rounds))}
        rounds.append(times | {"rate": matrix_rate(), "bandwidth": bandwidth()})

    benchmark.pedantic(run_round, rounds=ROUNDS[batch], warmup_rounds=1)
    if benchmark.disabled:
        return
    rounds = rounds[-ROUNDS[batch] :]
    per_step = 1e3 / batch / steps_of(batch)
    mine = []
    for name in names:
        faster = spread([times[PLAIN] / times[name] for times in rounds])
        with LiveMemory() as memory:
            steps[name]()
        row = {
            "cell": cell,
            "batch": batch,
            "variant": name,
            "ms": per_step * median(rounds, name),
            "speedup": faster["median"],
            "p20": faster["p20"],
            "p80": faster["p80"],
            "over_stored": None if name == PLAIN else over_stored(rounds, name),
            "rate": spread([counter.get_total_flops() / t[name] / t["rate"] for t in rounds])["median"],
            "mb": memory.peak / 1e6,
        }
        mine.append(row)
    results["rows"] += mine
    with Launches() as launches:
        steps[name_of(VARIANTS[0])]()
    moved = sum(count.bytes for count in launches.counts.values())
    fastest = min(mine, key=lambda row: row["ms"])
    floor = {
        "cell": cell,
        "batch": batch,
        "gflop": counter.get_total_flops() / batch / steps_of(batch) / 1e9,
        "gflops": median(rounds, "rate") / 1e9,
        "arithmetic_ms": per_step * counter.get_total_flops() / median(rounds, "rate"),
        "mb": moved / batch / steps_of(batch) / 1e6,
        "gbs": median(rounds, "bandwidth") / 1e9,
        "memory_ms": per_step * moved / median(rounds, "bandwidth"),
        "fastest": fastest["variant"],
        "fastest_ms": fastest["ms"],
    }
    results["floors"].append(floor)


def median(rounds: list[dict[str, float]], name: str) -> float:
    """Of one thing that was measured in every round."""
    return spread([r[name] for r in rounds])["median"]


def over_stored(rounds: list[dict[str, float]], name: str) -> float:
    """Time over that of stored training with as many clips at once, within each round."""
    stored = name_of(VARIANTS[len(ONE_BY_ONE) if ALL in name else 0])
    return spread([times[name] / times[stored] for times in rounds])["median"]


def bandwidth() -> float:
    """Bytes per second that a copy reads and writes, the fastest of a few."""
    source, target = torch.ones(COPIED), torch.empty(COPIED)
    times = []
    for _ in range(5):
        start = time.process_time()
        target.copy_(source)
        times.append(time.process_time() - start)
    return 2 * source.nbytes / min(times)


def matrix_rate() -> float:
    """FLOPs per second of a matrix product, the fastest of a few."""
    a, b = torch.randn(2, SIDE, SIDE)
    times = []
    for _ in range(5):
        start = time.process_time()
        torch.mm(a, b)
        times.append(time.process_time() - start)
    return 2 * SIDE**3 / min(times)
