"""What keeping freed memory brings on a CPU: `pytest benchmarks/test_heap.py --benchmark-only --sweeps`.

Each way in processes of its own, which take turns: `python -m benchmarks.test_heap evaluation --kept` is one of them.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.reporting import Report, Table, spread
from benchmarks.training import random_clips, training_step
from crevnet.convolution import use_channels_last
from crevnet.data import MovingMNISTConfig
from crevnet.evaluate import score
from crevnet.heap import keep_freed_memory
from crevnet.model import CrevNet, CrevNetConfig

ROUNDS, CALLS = 5, 4
OBSERVED, PREDICTED = 5, 5
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("one_thread")]

NOTES = (
    "The ST-LSTM model of quick.yaml, float32, one thread. Training step: 16 sequences, forward and backward pass. "
    "Evaluation: 32 sequences, prediction and metrics. Page faults and processor time: medians over "
    f"{ROUNDS} rounds of two processes each, of the medians of {CALLS} calls, after one that does not count. The ratio "
    "is taken within each round.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    columns = {"task": "task", "memory": "freed memory", "faults": "page faults", "ms": "ms"}
    columns |= {"ratio": "over handed back", "p20": "p20", "p80": "p80"}
    tables = {"rows": Table("Freed memory kept, and handed back to the system", columns, rows)}
    configuration = {"rounds": ROUNDS, "calls": CALLS, "dtype": "float32", "threads": 1}
    complete = len(rows) == 2 * len(TASKS)
    publish(Report("heap", "Freed memory", tables, configuration, NOTES, complete=complete, page=PAGE))


def training() -> Callable[[], object]:
    """A training step."""
    model, config = quick()
    clips = random_clips(config, 16, OBSERVED + PREDICTED - 1)
    return lambda: training_step(model, clips)


def evaluation() -> Callable[[], object]:
    """Prediction and metrics of a batch."""
    model, _ = quick()
    data = MovingMNISTConfig(image_size=32, digit_size=14, frames=OBSERVED + PREDICTED, test_sequences=32)
    return partial(score, model, data.build_test(), OBSERVED, batch_size=32, device=torch.device("cpu"))


def quick() -> tuple[CrevNet, CrevNetConfig]:
    """The model that the README trains."""
    config = CrevNetConfig(image_size=32, clip=3, blocks=(2, 2), modules=4, clips_at_once=20)
    model = config.build()
    use_channels_last(model)
    return model, config


TASKS = {"training step": training, "evaluation": evaluation}


@pytest.mark.parametrize("task", TASKS)
def test_task(benchmark, results, task):
    rounds: list[dict[str, dict[str, float]]] = []

    def run_round() -> None:
        ways = ["kept", "handed back"]
        rounds.append({way: in_a_process(task, way) for way in ways[:: 1 if len(rounds) % 2 else -1]})

    benchmark.pedantic(run_round, rounds=ROUNDS)
    if benchmark.disabled:
        return
    rounds = rounds[-ROUNDS:]
    for way in ("handed back", "kept"):
        ratio = spread([found[way]["ms"] / found["handed back"]["ms"] for found in rounds])
        row = {"task": task, "memory": way}
        row |= {key: spread([found[way][key] for found in rounds])["median"] for key in ("faults", "ms")}
        results.append(row | {"ratio": ratio["median"], "p20": ratio["p20"], "p80": ratio["p80"]})


def in_a_process(task: str, way: str) -> dict[str, float]:
    """Page faults and milliseconds of a call."""
    command = [sys.executable, "-m", "benchmarks.test_heap", task, *(["--kept"] if way == "kept" else [])]
    folder = Path(__file__).parents[1]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder).stdout)


def main() -> None:
    """Measure in this process."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--kept", action="store_true", help="keep freed memory")
    arguments = parser.parse_args()
    if arguments.kept and not keep_freed_memory():
        raise SystemExit("freed memory cannot be kept here")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    call = TASKS[arguments.task]()
    times, faults = [], []
    for _ in range(1 + CALLS):
        gc.collect()
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(json.dumps({"ms": spread(times[1:])["median"], "faults": spread(faults[1:])["median"]}))


if __name__ == "__main__":
    main()
