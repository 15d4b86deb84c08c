"""Speed of generating Moving MNIST, alone and beside the training step that it feeds: `pytest benchmarks/test_data.py
--benchmark-only`. On the CPU, with a GPU as well.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from benchmarks.reporting import Report, Row, Table, spread
from crevnet.clips import frames_to_clips
from crevnet.command import CONFIGS, load_config
from crevnet.convolution import use_channels_last
from crevnet.data import MovingMNISTConfig, train_batches

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 16
DIGITS = (1, 2, 3)
WORKERS = {"none": 0, "one process ahead": 1}
STEPS = 2
QUICK = CONFIGS / "quick.yaml"

NOTES = (
    f"Generating: batches of {BATCH} sequences of 20 frames, 64 x 64, on one thread.",
    f"Beside the training step: `{QUICK.name}`, reversible, one thread; forward and backward pass and Adam. "
    "Waiting is the time until the next batch is drawn, share is waiting over waiting and step. "
    f"Median of {STEPS} steps.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[dict[str, list[dict[str, Any]]]]:
    rows: dict[str, list[dict[str, Any]]] = {"generation": [], "feeding": []}
    yield rows
    publish(report(**rows))


def report(generation: Sequence[Row], feeding: Sequence[Row]) -> Report:
    """What is published."""
    generating = {
        "num_digits": "digits",
        "sequences_per_second": "sequences/s",
        "p20": "ms per batch, p20",
        "median": "median",
        "p80": "p80",
    }
    waiting = {"prefetch": "prefetch", "waiting_ms": "waiting, ms", "step_ms": "step, ms", "share": "share"}
    tables = {
        "generation": Table("Generating training sequences", generating, generation),
        "feeding": Table("Beside the training step that they feed", waiting, feeding, formats={"share": ".2%"}),
    }
    configuration = {
        "data": str(config(DIGITS[0])),
        "num_digits": DIGITS,
        "batch": BATCH,
        "training": str(load_config(QUICK)),
        "threads": 1,
    }
    complete = (len(generation), len(feeding)) == (len(DIGITS), len(WORKERS))
    return Report("moving_mnist", "Moving MNIST", tables, configuration, NOTES, complete=complete)


@pytest.mark.parametrize("num_digits", DIGITS)
def test_generate_training_batches(benchmark, results, num_digits):
    batch = benchmark(next, train_batches(config(num_digits).build_train(), BATCH))
    assert batch.shape == (BATCH, 20, 1, 64, 64)
    if benchmark.disabled:
        return
    milliseconds = spread([1e3 * seconds for seconds in benchmark.stats.stats.data])
    per_second = 1e3 * BATCH / milliseconds["median"]
    results["generation"].append({"num_digits": num_digits, "sequences_per_second": per_second, **milliseconds})
    benchmark.extra_info.update(batch_size=BATCH, config=str(config(num_digits)), sequences_per_second=per_second)


@pytest.mark.parametrize("prefetch", WORKERS)
def test_waiting_for_data_beside_the_training_step(benchmark, results, prefetch):
    training = load_config(QUICK)
    torch.manual_seed(0)
    model = training.model.build()
    use_channels_last(model)
    adam = torch.optim.Adam(model.parameters(), lr=training.optimiser.learning_rate)
    batches = train_batches(training.data.build_train(), training.batch_size, workers=WORKERS[prefetch])
    times: list[tuple[float, float]] = []

    def step() -> None:
        start = time.perf_counter()
        frames = next(batches)
        there = time.perf_counter()
        loss = model.loss(frames_to_clips(frames, training.model.clip, training.model.stacking))
        adam.zero_grad()
        loss.backward()
        adam.step()
        loss.item()
        times.append((there - start, time.perf_counter() - there))

    benchmark.pedantic(step, rounds=STEPS, warmup_rounds=1)
    if benchmark.disabled:
        return
    waiting, working = (spread([1e3 * seconds for seconds in part])["median"] for part in zip(*times[1:], strict=True))
    share = waiting / (waiting + working)
    assert share < 0.1, "data is the bottleneck"
    results["feeding"].append({"prefetch": prefetch, "waiting_ms": waiting, "step_ms": working, "share": share})


def config(num_digits: int) -> MovingMNISTConfig:
    """The paper's sequences with this many digits."""
    return MovingMNISTConfig(num_digits=num_digits, image_size=64, digit_size=28, frames=20)
