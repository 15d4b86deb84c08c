"""What the compiler makes of the kernels: `pytest benchmarks/test_kernel_resources.py --benchmark-only --sweeps`.

No GPU is needed. Registers, stack, shared memory and widths of accesses of every kernel, compiled for GPUs of two
generations, and the bytes that it moves beside those that plain PyTorch moves. Spills are asserted to be none; see
also `tests/kernels/test_compile.py`.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from revgrad_kernels.backend import HAS_TRITON

from benchmarks.kernel_resources import BATCH, CAPABILITIES, DTYPES, NEWEST, in_own_process
from benchmarks.reporting import Report, Table

pytestmark = [pytest.mark.sweep, pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")]

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
EVERY = ("operator", "pass", "dtype", "layout", "target", "tile", "warps", "registers", "stack", "shared")

NOTES = (
    "Compiled as the launchers of the operators ask for it, for float32 and bfloat16 and every configuration that is "
    "tuned over; nothing was run on a GPU. Registers and shared memory (bytes of a program): the most of any "
    "configuration and target. Stack and local memory (spills): none anywhere, which is asserted.",
    "Widths of loads and stores: bytes per instruction and thread, narrowest to widest, in the first configuration on "
    "the newest target. 16 is the most that a GPU has.",
    "Bytes: of the tensors that a kernel is given, per element of a stream, each once; what grows with the batch. "
    "Plain: of the operators that plain PyTorch takes for the same, inputs and outputs of each.",
    f"Batch {BATCH} of CrevNet's streams of 32 x 3 x 8 x 8. What several operators or layouts launch is shown once: "
    "pixel_shuffle is the backward pass of pixel_unshuffle, for instance.",
)


@pytest.fixture(scope="module")
def results(publish) -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {}
    yield found
    rows = found.get("rows", [])
    distinct = {row["binary"]: {key: row[key] for key in EVERY} for row in reversed(rows)}
    summary = {
        "operator": "operator",
        "pass": "pass",
        "layout": "layout",
        "registers": "registers, fp32",
        "registers_bf16": "bf16",
        "shared": "shared",
        "widths": "loads; stores, fp32",
        "widths_bf16": "bf16",
        "bytes": "bytes per element, fp32",
        "bytes_bf16": "bf16",
        "plain": "plain, fp32",
        "plain_bf16": "bf16",
    }
    tables = {
        "summary": Table("Compiled kernels", summary, summarised(rows, found.get("plain", [])), decimals=1),
        "rows": Table("Every configuration", {key: key for key in EVERY}, list(distinct.values())[::-1]),
    }
    configuration = {
        "triton": found.get("triton"),
        "targets": [f"sm_{c}" for c in CAPABILITIES],
        "dtypes": list(DTYPES),
        "batch": BATCH,
    }
    publish(Report("kernel_resources", "Kernels, compiled", tables, configuration, NOTES, page=PAGE))


def test_compiles_without_spills(benchmark, results):
    results |= benchmark.pedantic(in_own_process, rounds=1)
    assert not results["missing"]
    assert not [row for row in results["rows"] if row["stack"] or row["local"]]


def summarised(rows: list[dict[str, Any]], plain: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every operator, pass and layout that has a binary of its own."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["operator"], row["pass"], row["layout"]].append(row)
    moved = {(p["operator"], p["pass"], p["dtype"]): p["bytes_per_element"] for p in plain}
    shown: dict[frozenset[str], dict[str, Any]] = {}
    for (operator, direction, layout), mine in groups.items():
        binaries = frozenset(row["binary"] for row in mine)
        if binaries in shown:
            if (shown[binaries]["operator"], shown[binaries]["pass"]) == (operator, direction):
                shown[binaries]["layout"] = "any"
            continue
        shown[binaries] = {
            "operator": operator,
            "pass": direction,
            "layout": layout,
            "shared": max(row["shared"] for row in mine),
        }
        for dtype, suffix in zip(DTYPES, ("", "_bf16"), strict=True):
            of_dtype = [row for row in mine if row["dtype"] == dtype]
            newest = next(row for row in of_dtype if row["target"] == f"sm_{NEWEST}")
            shown[binaries] |= {
                f"registers{suffix}": max(row["registers"] for row in of_dtype),
                f"widths{suffix}": f"{span(newest['loads'])}; {span(newest['stores'])}",
                f"bytes{suffix}": newest["bytes_per_element"],
                f"plain{suffix}": moved[operator, direction, dtype],
            }
    return list(shown.values())


def span(widths: list[int]) -> str:
    """Narrowest to widest."""
    return "-".join(str(w) for w in dict.fromkeys((widths[0], widths[-1])))
