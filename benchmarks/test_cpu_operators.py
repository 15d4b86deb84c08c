"""The operators on a CPU beside the plain PyTorch whose place they take: `pytest benchmarks/test_cpu_operators.py
--benchmark-only`.

Inputs as CrevNet has them. Both take turns in one process, with and without gradients; the table shows ratios.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.operators import OPERATORS, Inputs, backward, outputs, with_gradients
from benchmarks.reporting import Report, Table, spread

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = (1, 4, 16)
ROUNDS, WARMUP = 40, 5
REPETITIONS = 3
PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
TWINS = [operator for operator in OPERATORS if not operator.name.startswith("exact")]
"""Exact operators stand for nothing that is simpler than their own reference."""

NOTES = (
    "Time of the operator over that of the same in plain PyTorch, which takes turns with it in one process on one "
    "thread: median of the ratios of all rounds. Below 1 the operator is faster.",
    "float32 and contiguous; a state of batch 1 has 6,144 elements.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[dict[str, dict[str, Any]]]:
    rows: dict[str, dict[str, Any]] = {}
    yield rows
    columns = {"operator": "operator"}
    columns |= {f"forward_{b}": f"forward, batch {b}" for b in BATCHES}
    columns |= {f"training_{b}": f"forward and backward, batch {b}" for b in BATCHES}
    table = Table("Operators on a CPU, time over plain PyTorch", columns, list(rows.values()))
    complete = len(rows) == len(TWINS) and all(f"forward_{b}" in row for row in rows.values() for b in BATCHES)
    configuration = {"batches": BATCHES, "rounds": ROUNDS, "repetitions": REPETITIONS, "dtype": "float32", "threads": 1}
    publish(
        Report(
            "cpu_operators", "Operators on a CPU", {"rows": table}, configuration, NOTES, complete=complete, page=PAGE
        )
    )


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("operator", TWINS, ids=lambda o: o.name)
def test_beside_plain_pytorch(benchmark, results, operator, batch):
    passes = {"forward": without_gradients, "training": forward_and_backward}
    if not operator.differentiable:
        del passes["training"]
    leaves = operator.leaves(Inputs(batch))
    calls = {
        name: [one_pass(function, leaves) for function in (operator.fused, operator.plain)]
        for name, one_pass in passes.items()
    }
    rounds: list[dict[str, float]] = []

    def run_round() -> None:
        first = len(rounds) % 2
        ratios = {}
        for name, pair in calls.items():
            seconds = {i: measured(pair[i]) for i in (first, 1 - first)}
            ratios[name] = seconds[0] / seconds[1]
        rounds.append(ratios)

    benchmark.pedantic(run_round, rounds=ROUNDS, warmup_rounds=WARMUP)
    if benchmark.disabled:
        return
    row = results.setdefault(operator.name, {"operator": operator.name})
    row |= {f"{name}_{batch}": spread([r[name] for r in rounds[WARMUP:]])["median"] for name in calls}


def without_gradients(function: Callable[..., Any], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    """A forward pass alone."""
    return torch.no_grad()(lambda: function(*leaves))


def forward_and_backward(function: Callable[..., Any], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    """A forward and a backward pass."""
    grads = [torch.randn_like(y) for y in with_gradients(outputs(function(*leaves)))]
    return lambda: backward(outputs(function(*leaves)), leaves, grads)


def measured(call: Callable[[], Any]) -> float:
    """Processor time of a few calls."""
    started = time.process_time()
    for _ in range(REPETITIONS):
        call()
    return time.process_time() - started
