"""Speed bought with memory: `pytest benchmarks/test_budget.py --benchmark-only`.

The stack of convolutions with a memory budget from nothing to all that stored autograd takes. Memory and evaluations
are asserted, times are not.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.contenders import by_revgrad, stored
from benchmarks.engine_measures import MIB, counts, loss_weight, step_seconds
from benchmarks.engine_workloads import CONVOLUTION
from benchmarks.pictures import time_against_budget
from benchmarks.reporting import Report, Table, spread
from revgrad import ReversibleSequential, plan

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS, ROUNDS, PARTS = 16, 3, 8
FRACTIONS = [i / PARTS for i in range(PARTS + 1)]
SUBTITLE = f"{BLOCKS} blocks: {CONVOLUTION.description}"

NOTES = (
    "Budget: what stored layers may take beyond what the reversible chain keeps; the last one is what storing every "
    "layer takes.",
    "Peak: most bytes of tensors alive in a training step. Weights, their gradients, and the input with its gradient "
    "exist before and do not count. 1 MiB is 2^20 bytes.",
    f"Time: processor time of one step on one thread over that of stored autograd, within each of {ROUNDS} rounds, "
    "which run every budget once; the order rotates. Predicted: FLOPs of the plan, a backward pass taken for two "
    "forward passes.",
    f"{SUBTITLE}. float32 on a CPU.",
)
COLUMNS = {
    "budget_mib": "budget, MiB",
    "layers": "stored layers",
    "planned_mib": "planned to keep, MiB",
    "peak_mib": "peak, MiB",
    "evaluations": "evaluations",
    "predicted": "predicted time",
    "time_ratio": "time over stored",
    "p20": "p20",
    "p80": "p80",
}


@pytest.fixture(scope="module")
def results(publish) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    complete = len(rows) == len(FRACTIONS) and all("time_ratio" in row for row in rows)
    table = Table("Step time against the memory budget", COLUMNS, rows, formats={"evaluations": ".2f"})
    configuration = {"workload": CONVOLUTION.name, "blocks": BLOCKS, "rounds": ROUNDS, "threads": 1}
    pictures = {"budget.png": time_against_budget(rows, SUBTITLE)} if complete else {}
    publish(Report("budget", "Memory as a budget", {"rows": table}, configuration, NOTES, pictures, complete))


def test_step_time_against_budget(benchmark, results):
    stack, x = CONVOLUTION.build(BLOCKS)
    chain = by_revgrad(stack, "float")
    assert isinstance(chain, ReversibleSequential)
    whole = plan(chain, x)
    room = whole.stored.kept_bytes - whole.reversible.kept_bytes
    budgets = [round(room * fraction) for fraction in FRACTIONS]
    planned = plan(chain, x, budgets=budgets).budgeted
    weight = loss_weight(x)
    baseline = stored(stack)
    rounds: list[list[float]] = []

    for budget, way in zip(budgets, planned, strict=True):
        chain.memory_budget = budget
        chain(x)  # measures what layers take
        found = counts(chain, stack, x)
        row = {"budget_mib": budget / MIB, "layers": f"{way.stored_layers} of {whole.layers}"}
        row |= {"planned_mib": way.kept_bytes / MIB, "peak_mib": found.peak_mib, "evaluations": found.evaluations}
        results.append(row | {"predicted": whole.step_flops(way)})
    lowest = results[0]["peak_mib"]
    for row in results:
        assert row["peak_mib"] <= lowest + row["budget_mib"] + 1e-3
    assert [results[0]["evaluations"], results[-1]["evaluations"]] == [2, 1]
    evaluations = [row["evaluations"] for row in results]
    assert evaluations == sorted(evaluations, reverse=True)

    def seconds(variant: int) -> float:
        if variant == len(budgets):
            return step_seconds(baseline, x, weight)
        chain.memory_budget = budgets[variant]
        return step_seconds(chain, x, weight)

    def run_round() -> None:
        count = len(budgets) + 1
        times = {v % count: seconds(v % count) for v in range(len(rounds), len(rounds) + count)}
        rounds.append([times[v] / times[len(budgets)] for v in range(len(budgets))])

    benchmark.pedantic(run_round, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.disabled:
        return
    for row, ratios in zip(results, zip(*rounds[-ROUNDS:], strict=True), strict=True):
        found = spread(ratios)
        row |= {"time_ratio": found["median"], "p20": found["p20"], "p80": found["p80"]}
