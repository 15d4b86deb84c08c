"""A training step of the paper's CrevNet beside plain PyTorch: `pytest benchmarks/test_training_step.py
--benchmark-only --sweeps`.

The plain model (`plain_crevnet.py`) has the same weights, a convolution per gate and nothing fused; all variants take
turns in one process. The rate of a matrix product, measured in the same rounds, is what arithmetic could reach.
"""

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain_crevnet import PlainCrevNet
from benchmarks.reporting import Report, Table, spread
from benchmarks.training import CELLS, Variant, random_clips
from crevnet.model import CrevNetConfig
from revgrad import LiveMemory

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("one_thread")]

STEPS = 4
ROUNDS = {1: 8, 4: 5, 16: 3}
PLAIN = "plain PyTorch"
VARIANTS = (Variant("stored", "float"), Variant("reversible", "float"), Variant("reversible"))
TARGET = {1: 2.5, 4: 2.5, 16: 2.0}
"""How many times as fast as plain PyTorch training is to be."""
SIDE = 1024

NOTES = (
    f"Forward pass with teacher forcing, mean squared error, backward pass; {STEPS} time steps of the paper's Moving "
    "MNIST configuration, float32, one thread; random weights and frames. Without the optimiser.",
    "Speed-up: time of plain PyTorch over that of the variant, median over the rounds, each of which runs all once.",
    f"Rate: FLOPs of the convolutions in the forward and backward pass of plain PyTorch, over the time, as a fraction "
    f"of the rate of a product of two {SIDE} x {SIDE} matrices in the same round. A reversible step does 4/3 of these "
    "FLOPs, which are not counted.",
    "MB: peak of live tensor bytes of the step, all sequences of the batch; see training_memory.md for what one more "
    "sequence takes.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    columns = {"cell": "cell", "batch": "batch", "variant": "variant", "ms": "ms per sequence and time step"}
    columns |= {"speedup": "speed-up", "p20": "p20", "p80": "p80", "rate": "rate", "mb": "MB"}
    tables = {"rows": Table("A training step beside plain PyTorch", columns, rows)}
    configuration = {"model": str(CrevNetConfig()), "steps": STEPS, "rounds": ROUNDS, "dtype": "float32", "threads": 1}
    complete = len(rows) == len(CELLS) * len(ROUNDS) * (1 + len(VARIANTS))
    publish(Report("training_step", "Training step", tables, configuration, NOTES, complete=complete))


@pytest.mark.parametrize("batch", ROUNDS)
@pytest.mark.parametrize("cell", CELLS)
def test_beside_plain_pytorch(benchmark, results, cell, batch):
    torch.manual_seed(0)
    config = CrevNetConfig(cell=cell)
    model, clips = config.build(), random_clips(config, batch, STEPS)
    plain = PlainCrevNet(model)
    steps: dict[str, Callable[[], None]] = {PLAIN: lambda: plain.loss(clips).backward()}

    def stepping(variant: Variant) -> Callable[[], None]:
        def step() -> None:
            model.config = variant.of(config)
            model.loss(clips).backward()

        return step

    steps |= {str(variant): stepping(variant) for variant in VARIANTS}
    with FlopCounterMode(display=False) as counter:
        steps[PLAIN]()
    names, rounds = list(steps), []

    def run_round() -> None:
        shift = len(rounds) % len(names)
        rounds.append({name: seconds(steps[name]) for name in names[shift:] + names[:shift]} | {"rate": matrix_rate()})

    benchmark.pedantic(run_round, rounds=ROUNDS[batch], warmup_rounds=1)
    if benchmark.disabled:
        return
    for name in names:
        faster = spread([times[PLAIN] / times[name] for times in rounds[1:]])
        with LiveMemory() as memory:
            steps[name]()
        row = {
            "cell": cell,
            "batch": batch,
            "variant": name,
            "ms": 1e3 * spread([times[name] for times in rounds[1:]])["median"] / batch / STEPS,
            "speedup": faster["median"],
            "p20": faster["p20"],
            "p80": faster["p80"],
            "rate": spread([counter.get_total_flops() / t[name] / t["rate"] for t in rounds[1:]])["median"],
            "mb": memory.peak / 1e6,
            "target": None if name == PLAIN else TARGET[batch],
        }
        results.append(row)


def seconds(step: Callable[[], None]) -> float:
    """Processor time of a step; gradients add up."""
    gc.collect()
    start = time.process_time()
    step()
    return time.process_time() - start


def matrix_rate() -> float:
    """FLOPs per second of a matrix product, the fastest of a few."""
    a, b = torch.randn(2, SIDE, SIDE)
    times = []
    for _ in range(5):
        start = time.process_time()
        torch.mm(a, b)
        times.append(time.process_time() - start)
    return 2 * SIDE**3 / min(times)
