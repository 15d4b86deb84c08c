"""The engine against its peers: `pytest benchmarks/test_engine.py --benchmark-only`.

The same stacks of additive couplings with the same weights, in one process, by every way there is to run them. Counts
(memory, evaluations, exactness) are asserted. Times are not: the table says whether the target was met.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contenders import CONTENDERS, EXACT, FORWARD, FREE, SELDOM, STORED, Contender, Model, by_revgrad
from benchmarks.engine_measures import (
    Counts,
    counts,
    forward_seconds,
    loss_weight,
    relative_error,
    step_seconds,
    true_gradient,
)
from benchmarks.engine_workloads import CONVOLUTION, TRANSFORMER, WORKLOADS, Stack, Workload
from benchmarks.pictures import engine_memory, engine_time
from benchmarks.reporting import Report, Table, spread
from benchmarks.timing import FEWEST, ratios, rotated, rounds_within

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = {
    (CONVOLUTION, 4): 15,
    (CONVOLUTION, 16): 9,
    (CONVOLUTION, 64): 5,
    (TRANSFORMER, 4): 7,
    (TRANSFORMER, 12): 5,
    (TRANSFORMER, 24): 3,
}
"""The most of every stack."""
SHORTEST = CONVOLUTION, 4
SECONDS = 12
"""How long the rounds of a stack take, unless the fewest take longer."""
PEAK_MIB = {CONVOLUTION: 11, TRANSFORMER: 20}
TIME_RATIO = 1.33

NOTES = (
    "Peak: most bytes of tensors alive from the start of the forward to the end of the backward pass, whatever made "
    "them: activations, their gradients, the output, and gradients of weights until they are added up. Weights, the "
    "sums of their gradients, and the input with its gradient exist before and do not count. 1 MiB is 2^20 bytes.",
    "Time: processor time of one step on one thread. Ratios are taken within each round, which runs every contender "
    "once, of the shortest step twice, and then the second time counts: what a step frees goes back to the system, "
    "and the more a step needs, the more it has to ask for again, so that a short step pays for what the contender "
    f"before it has left. Checkpoints and memcnn run in one round out of {SELDOM}, the first among them. The order "
    "rotates. The step in which memory is counted comes before all rounds. The first three passes of a chain of ours, "
    "in which messages are compared, do not count.",
    f"Rounds: as many as fit into {SECONDS} seconds, {FEWEST} at least. Median over those that the contender was in, "
    f"p20 and p80 where these are {FEWEST} or more.",
    "Gradient error: L2 norm of the difference to the gradients of the weights in float64 by stored autograd, over "
    "the norm of those. Where it is the same for all, it is the error of the forward pass in float32.",
    "Exact arithmetic rounds the streams to multiples of 2^-16, hence its distance to float64; beside stored "
    "autograd on the same rounded streams, its gradients of all weights and of the input are equal bit for bit "
    "(asserted).",
    "Two evaluations: 1 plus the time of a forward pass without a graph over that of a stored step in the same rounds. "
    "What evaluates every transform twice takes about that much on this machine, and less where the second evaluation "
    "has less to do (batch normalisation with statistics that are known).",
    "Evaluations: calls of each transform in one training step. memcnn's first block keeps its input, which is the "
    "caller's and would be freed; the other blocks recover theirs and then run again.",
    "Free budget: `memory_budget='free'` stores those transforms at the end that leave the peak where it is; here that "
    "is the last one.",
    *(f"{w.name.capitalize()}: {w.description}. All float32 on a CPU." for w in WORKLOADS),
)

COLUMNS = {
    "workload": "workload",
    "depth": "blocks",
    "contender": "contender",
    "peak_mib": "peak MiB",
    "slope_mib_per_block": "MiB per block",
    "evaluations": "evaluations",
    "time_ratio": "time over stored",
    "p20": "p20",
    "p80": "p80",
    "two_evaluations": "two evaluations",
    "over_fastest_peer": "over fastest reversible peer",
    "seconds": "seconds",
    "rounds": "rounds",
    "grad_error": "gradient error",
    "equals_stored": "equal bits",
    "error": "error",
}

Row = dict[str, Any]
Rows = dict[tuple[Workload, int, Contender], Row]
Times = dict[Contender, float]
"""Seconds of a step in one round."""


@pytest.fixture(scope="module")
def results(publish) -> Iterator[Rows]:
    rows: Rows = {
        (workload, depth, contender): {"contender": contender.name, "workload": workload.name, "depth": depth}
        for workload, depth in ROUNDS
        for contender in CONTENDERS
    }
    yield rows
    for row in rows.values():
        for key in COLUMNS:
            row.setdefault(key, None)
    complete = all((row["peak_mib"] and row["time_ratio"]) or row["error"] for row in rows.values())
    every = [row for row in rows.values() if row["peak_mib"] or row["time_ratio"] or row["error"]]
    tables = {workload.name: by_contender(every, workload) for workload in WORKLOADS}
    tables["targets"] = Table(
        "What the engine is to reach",
        {"workload": "workload", "depth": "blocks", "contender": "contender", "what": "what"}
        | {"measured": "measured", "target": "at most", "outcome": "outcome", "floor": "two evaluations"},
        targets(rows) if complete else [],
    )
    tables["rows"] = Table("All of it", COLUMNS, every, formats={"grad_error": ".1e", "seconds": ".3f"})
    configuration = {
        "workloads": {w.name: {"depths": w.depths, "state": w.shape, "blocks": w.description} for w in WORKLOADS},
        "rounds": [[w.name, depth, rows[w, depth, STORED]["rounds"]] for w, depth in ROUNDS],
        "dtype": "float32",
        "threads": 1,
    }
    report = Report(
        "engine",
        "The engine and its peers",
        tables,
        configuration,
        (*NOTES, rounds_in_words(rows)),
        {"engine_memory.png": engine_memory(every), "engine_time.png": engine_time(every)} if complete else {},
        complete=complete,
        versions={c.name: c.version() or "not installed" for c in CONTENDERS if c.package},
    )
    publish(report)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(("workload", "depth"), ROUNDS, ids=lambda x: getattr(x, "name", x))
def test_stack(benchmark, results, workload, depth):
    stack, x = workload.build(depth)
    models, errors = working(workload, stack, x)
    rows = {contender: results[workload, depth, contender] for contender in CONTENDERS}
    with all_cores():
        truth = true_gradient(stack, x)
        for contender in list(models):
            try:
                rows[contender] |= counted(contender, models[contender], stack, x, truth)
            except Exception as error:  # a peer may fail in any way; the others go on
                errors[contender] = f"{type(error).__name__}: {error}"
                del models[contender]
    models[FORWARD] = FORWARD.build(stack)
    steps = 1 + ((workload, depth) == SHORTEST)
    most = 1 if benchmark.disabled else ROUNDS[workload, depth]
    rounds = benchmark.pedantic(timed, (models, stack, x, steps, most), rounds=1)
    if not benchmark.disabled:
        for contender, row in of_times(rounds).items():
            rows[contender] |= row
    for contender, error in errors.items():
        rows[contender]["error"] = error
        assert not contender.ours, error
    for contender in CONTENDERS:
        fill_in_slope(results, workload, contender)
        if contender.ours:
            row = rows[contender]
            assert row["peak_mib"] <= PEAK_MIB[workload]
            assert abs(row.get("slope_mib_per_block", 0)) < 1e-3
            assert row["evaluations"] == 2 - (contender is FREE) / len(stack.transforms)
    assert rows[EXACT]["equals_stored"] is True


def counted(contender: Contender, model: Model, stack: Stack, x: Tensor, truth: Tensor) -> Row:
    """What does not depend on the machine's load, of one step."""
    found = counts(model, stack, x, resized=contender.resizes)
    row = {"peak_mib": found.peak_mib, "evaluations": found.evaluations}
    row["grad_error"] = relative_error(found.gradient, truth)
    if contender is EXACT:
        row["equals_stored"] = same_gradients(found, counts(by_revgrad(stack, "exact", "stored"), stack, x))
    return row


def timed(models: dict[Contender, Model], stack: Stack, x: Tensor, steps: int, most: int) -> list[Times]:
    """Times in turns, of which the last of so many steps counts; at most so many rounds."""
    for leaf in (*stack.blocks.parameters(), x):
        leaf.grad = torch.zeros_like(leaf)
    weight = loss_weight(x)

    def run_round(number: int) -> Times:
        times = {}
        for contender in rotated([c for c in models if not c.seldom or number % SELDOM == 0], number):
            model = models[contender]
            for _ in range(steps):
                times[contender] = step_seconds(model, x, weight) if contender.trains else forward_seconds(model, x)
        return times

    return rounds_within(run_round, SECONDS, most)


@contextmanager
def all_cores() -> Iterator[None]:
    """What is only counted takes less time so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def of_times(rounds: list[Times]) -> dict[Contender, Row]:
    """What rounds tell of every contender that was in one."""
    measured = {c: [times[c] for times in rounds if c in times] for c in CONTENDERS}
    peers = [c for c in CONTENDERS if c.package and measured[c]]
    fastest = min(peers, key=lambda c: median(rounds, c, STORED), default=None)
    rows = {}
    for contender, seconds in measured.items():
        if seconds:
            over = spread(within(rounds, contender, STORED))
            row = {"time_ratio": over["median"], "seconds": spread(seconds)["median"], "rounds": len(seconds)}
            if len(seconds) >= FEWEST:
                row |= {"p20": over["p20"], "p80": over["p80"]}
            if contender.reversible and within(rounds, FORWARD, STORED):
                row["two_evaluations"] = 1 + median(rounds, FORWARD, STORED)
            if contender.ours and fastest is not None:
                row |= {"over_fastest_peer": median(rounds, contender, fastest), "fastest_peer": fastest.name}
            rows[contender] = row
    return rows


def working(workload: Workload, stack: Stack, x: Tensor) -> tuple[dict[Contender, Model], dict[Contender, str]]:
    """The models of those contenders that can take a step, and the errors of the others."""
    models, errors = {}, {}
    for contender in CONTENDERS:
        try:
            one, its_input = workload.build(1)
            counts(contender.build(one), one, its_input)  # this also loads what is loaded once
            models[contender] = contender.build(stack)
            if contender.measures:
                models[contender](x)
        except Exception as error:  # a package may be missing, or not work with this version of PyTorch
            errors[contender] = f"{type(error).__name__}: {error}"
    return models, errors


def same_gradients(one: Counts, other: Counts) -> bool:
    """Whether all gradients are equal, bit for bit."""
    return torch.equal(one.gradient, other.gradient) and torch.equal(one.input_gradient, other.input_gradient)


def median(rounds: list[Times], contender: Contender, over: Contender) -> float:
    """Median over the rounds of one time over another."""
    return spread(within(rounds, contender, over))["median"]


def within(rounds: list[Times], contender: Contender, over: Contender) -> list[float]:
    """One time over another in every round that has both."""
    both = [times for times in rounds if contender in times and over in times]
    return ratios([times[contender] for times in both], [times[over] for times in both])


def rounds_in_words(rows: Rows) -> str:
    """How many rounds there were of every stack."""
    found = {(w, depth): rows[w, depth, STORED]["rounds"] for w, depth in ROUNDS}
    parts = (f"{w.name}, {depth} blocks: {rounds}" for (w, depth), rounds in found.items() if rounds)
    return f"Rounds by stack: {'; '.join(parts)}."


def fill_in_slope(rows: Rows, workload: Workload, contender: Contender) -> None:
    """Growth of the peak from the shallowest to the deepest stack that was measured, per block."""
    mine = [rows[workload, depth, contender] for depth in workload.depths]
    measured = [row for row in mine if row.get("peak_mib")]
    if len(measured) > 1:
        first, last = measured[0], measured[-1]
        slope = (last["peak_mib"] - first["peak_mib"]) / (last["depth"] - first["depth"])
        for row in mine:
            row["slope_mib_per_block"] = slope


def targets(rows: Rows) -> list[Row]:
    """What the engine is to reach at each depth, with what was measured."""
    found = []
    for (workload, depth, contender), row in rows.items():
        if contender.ours:
            goals = [("peak MiB", "peak_mib", PEAK_MIB[workload]), ("time over stored", "time_ratio", TIME_RATIO)]
            goals += [(f"time over {row.get('fastest_peer')}, the fastest reversible peer", "over_fastest_peer", 1.0)]
            for what, key, target in goals:
                if row[key] is not None:
                    outcome = "met" if row[key] <= target else "MISSED"
                    line = {"workload": workload.name, "depth": depth, "contender": contender.name, "what": what}
                    line |= {"measured": row[key], "target": float(target), "outcome": outcome}
                    found.append(line | {"floor": row["two_evaluations"] if key == "time_ratio" else None})
    return found


def by_contender(rows: list[Row], workload: Workload) -> Table:
    """One line per contender, depths side by side."""
    lines = []
    for contender in CONTENDERS:
        mine = {r["depth"]: r for r in rows if r["contender"] == contender.name and r["workload"] == workload.name}
        if mine:
            last = mine[max(mine)]
            line = {f"peak_mib_{d}": row["peak_mib"] for d, row in mine.items()}
            line |= {f"time_ratio_{d}": row["time_ratio"] for d, row in mine.items()}
            same = ("contender", "slope_mib_per_block", "evaluations", "grad_error", "error")
            lines.append(line | {key: last[key] for key in same})
    columns = {"contender": "contender"} | {f"peak_mib_{d}": f"MiB, {d} blocks" for d in workload.depths}
    columns |= {"slope_mib_per_block": "per block", "evaluations": "evaluations"}
    columns |= {f"time_ratio_{d}": f"time, {d} blocks" for d in workload.depths}
    columns |= {"grad_error": f"gradient error, {workload.depths[-1]} blocks"}
    columns |= {"error": "error"} if any(line["error"] for line in lines) else {}
    peaks = {f"peak_mib_{d}": ".1f" for d in workload.depths}
    caption = f"{workload.name.capitalize()}: peak of activations, step time over stored autograd"
    return Table(caption, columns, lines, formats={"grad_error": ".1e", **peaks})
