"""Speed of generating Moving MNIST: `pytest benchmarks/test_data.py --benchmark-only`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.reporting import Report, Table, spread
from crevnet.data import DataConfig, train_batches

BATCH = 16
DIGITS = (1, 2, 3)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    columns = {
        "num_digits": "digits",
        "sequences_per_second": "sequences/s",
        "p20": "ms per batch, p20",
        "median": "median",
        "p80": "p80",
    }
    notes = (f"Batches of {BATCH} sequences of 20 frames, 64 x 64, on one thread.",)
    tables = {"generation": Table("Generating training sequences", columns, rows)}
    configuration = {"data": str(config(DIGITS[0])), "num_digits": DIGITS, "batch": BATCH, "threads": 1}
    complete = len(rows) == len(DIGITS)
    publish(Report("moving_mnist", "Moving MNIST", tables, configuration, notes, complete=complete))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Measure one core, whatever the machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("num_digits", DIGITS)
def test_generate_training_batches(benchmark, results, one_thread, num_digits):
    batch = benchmark(next, train_batches(config(num_digits).build_train(), BATCH))
    assert batch.shape == (BATCH, 20, 1, 64, 64)
    if benchmark.disabled:
        return
    milliseconds = spread([1e3 * seconds for seconds in benchmark.stats.stats.data])
    per_second = 1e3 * BATCH / milliseconds["median"]
    results.append({"num_digits": num_digits, "sequences_per_second": per_second, **milliseconds})
    benchmark.extra_info.update(batch_size=BATCH, config=str(config(num_digits)), sequences_per_second=per_second)


def config(num_digits: int) -> DataConfig:
    """The paper's sequences with this many digits."""
    return DataConfig(num_digits=num_digits, image_size=64, digit_size=28, frames=20)
