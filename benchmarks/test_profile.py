"""What a training step of CrevNet consists of: `pytest benchmarks/test_profile.py --benchmark-only --sweeps`.

Operators per time step, the bytes that they read and write, and where a CPU spends its time; with the reference
operators and with the fused ones. On a GPU an operator is a launch. Counts do not depend on the machine; the fused
ones are counted in Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from revgrad_kernels.backend import HAS_TRITON
from torch.profiler import ProfilerActivity, profile

from benchmarks.launches import Launches, group_of
from benchmarks.reporting import Report, Table
from benchmarks.training import CELLS, random_clips, training_step
from crevnet.model import CrevNetConfig

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("one_thread")]

BATCH, STEPS = 4, 1
PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
ARITHMETIC = ("exact", "float")

NOTES = (
    f"A reversible training step of the paper's configuration, batch {BATCH}, float32, one time "
    "step, without the optimiser; random weights and frames.",
    "Bytes: every input and output of an operator once, as if nothing stayed in a cache.",
    "CPU time: share of the step by PyTorch's profiler, reference operators, one thread.",
    "The weights' gradients are added up once per time step: at this batch a fixed share of the pointwise bytes.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    yield rows
    columns = {"cell": "cell", "arithmetic": "arithmetic", "operators": "kind of operator"}
    columns |= {"reference_calls": "calls", "reference_mb": "MB", "cpu_share": "CPU time, %"}
    columns |= {"fused_calls": "calls, fused", "fused_mb": "MB, fused"}
    tables = {"rows": Table("A time step of training, by kind of operator", columns, rows, decimals=1)}
    wanted = {(c, a) for c in CELLS for a in ARITHMETIC}
    complete = HAS_TRITON and {(r["cell"], r["arithmetic"]) for r in rows} == wanted
    configuration = {"model": str(CrevNetConfig()), "batch": BATCH, "steps": STEPS}
    title = "What a training step consists of"
    publish(Report("profile", title, tables, configuration, NOTES, complete=complete, page=PAGE))


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("cell", CELLS)
def test_profile(benchmark, results, cell, arithmetic):
    reference = benchmark.pedantic(counted, (cell, arithmetic), rounds=1, warmup_rounds=1)
    fused = counted_in_the_interpreter(cell, arithmetic) if HAS_TRITON else {}
    shares = cpu_shares(cell, arithmetic)
    for kind in sorted({*reference, *fused}, key=lambda k: -reference.get(k, {"bytes": 0})["bytes"]):
        row: dict[str, Any] = {"cell": cell, "arithmetic": arithmetic, "operators": kind}
        for name, counts in (("reference", reference), ("fused", fused)):
            count = counts.get(kind, {"calls": 0, "bytes": 0})
            row |= {f"{name}_calls": count["calls"] / STEPS, f"{name}_mb": count["bytes"] / STEPS / 1e6}
        results.append(row | {"cpu_share": shares.get(kind, 0.0)})
    if fused:
        assert sum(c["calls"] for c in fused.values()) < sum(c["calls"] for c in reference.values())


def counted(cell: Any, arithmetic: Any) -> dict[str, dict[str, int]]:
    """Calls and bytes of a training step by kind of operator."""
    config = CrevNetConfig(cell=cell, arithmetic=arithmetic)
    model, clips = config.build(), random_clips(config, BATCH, STEPS)
    # As on a GPU: what the CPU's own convolutions launch is not counted.
    with torch.backends.mkldnn.flags(enabled=False), Launches() as launches:
        training_step(model, clips)
    return {kind: asdict(count) for kind, count in launches.by_group().items()}


def counted_in_the_interpreter(cell: str, arithmetic: str) -> dict[str, dict[str, int]]:
    """`counted`, with fused operators: in a process of its own, as Triton decides early how to run kernels."""
    call = f"counted({cell!r}, {arithmetic!r})"
    code = (
        "import json, revgrad.coupling; from benchmarks.test_profile import counted; revgrad.coupling.NOTED = 0; "
        f"print(json.dumps({call}))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "REVGRAD_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    out = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def cpu_shares(cell: Any, arithmetic: Any) -> dict[str, float]:
    """Percent of a training step's time on the CPU by kind of operator."""
    config = CrevNetConfig(cell=cell, arithmetic=arithmetic)
    model, clips = config.build(), random_clips(config, BATCH, STEPS)
    training_step(model, clips)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        training_step(model, clips)
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        name = event.key
        kind = group_of(name.removeprefix("aten::")) if name.startswith(("aten::", "revgrad::")) else "Python, autograd"
        times[kind] += event.self_cpu_time_total
    total = sum(times.values())
    return {kind: 100 * t / total for kind, t in times.items()}
