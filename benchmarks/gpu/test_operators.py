"""Speed of every operator on a GPU: `pytest benchmarks/gpu/test_operators.py --benchmark-only`.

Against a copy of as many bytes, against plain PyTorch and against `torch.compile` of that, all in the same rounds.
Nothing is asserted: the table says which targets were met. Every operator is written when it has been measured, and is
added to those that were measured before, so that `-k` may cut the run into pieces of any size.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config

from benchmarks.gpu.operators import ELEMENTS, OPERATORS, SPEEDUP, Inputs, Operator, backward, outputs, with_gradients
from benchmarks.gpu.pictures import speed_of_operators
from benchmarks.gpu.pieces import joined
from benchmarks.gpu.timing import Call, cache_bytes, measure, sets_beyond_cache, timed
from benchmarks.reporting import Report, Table, spread
from benchmarks.timing import ratios
from crevnet.capture import side_stream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CREVNET = 16
"""Sequences of a batch of the paper: the tensors of its own training."""
MEGABYTES = (1, 16, 64, 256)
CHANNELS_LAST_MEGABYTES = 64
ROUNDS = 20
TENSORS = 250
"""As large as a stream, that all variants of the largest operator take together."""
OF_COPY, LARGE = 0.9, 64
"""Share of a copy's bandwidth that is wanted, and from how many megabytes on."""
_NOISE = 0.02

NOTES = (
    "A stream of CrevNet is 32 x 3 x 8 x 8 for one sequence. MB (2^20 bytes) are those of one stream or state, of "
    f"which an operator reads and writes several. `CrevNet` is a batch of {CREVNET}, as the paper trains. Exact "
    "operators have messages of the dtype and streams in float32.",
    "Time on the device: calls over several sets of inputs, together three times as large as the last-level cache, "
    f"captured in a CUDA graph; median, p20 and p80 of {ROUNDS} rounds. `called` is the time per call without a graph, "
    "one call after the other from Python.",
    "Bytes are those of inputs and results of the forward pass, and of what it saved and all gradients for the "
    "backward pass: each tensor once. `of copy` is the time that `Tensor.copy_` takes to read and write as many bytes, "
    "over the operator's.",
    "`over plain` and `over compiled` are the times of the same function in plain PyTorch, and of `torch.compile` of "
    "it for this very shape, over the operator's. Ratios are taken within a round.",
    "`first call` is with Triton's cache on disk empty: compilation, and tuning once per class of sizes.",
    f"Targets: {OF_COPY:.0%} of a copy from {LARGE} MB on; {SPEEDUP} times plain PyTorch for the weighted sum and the "
    f"cells; never slower than `torch.compile` (by more than {_NOISE:.0%}).",
)


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Any]]]:
    """The rows of this run, by dtype."""
    return {dtype: [] for dtype in DTYPES}


@pytest.fixture(scope="module")
def empty_cache() -> Iterator[None]:
    """Let Triton compile and tune anew, so that its time can be told."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRITON_CACHE_DIR", folder)
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_operator(benchmark, publish, results, empty_cache, operator, dtype):
    rows = benchmark.pedantic(measured, (operator, dtype), rounds=1)
    results[dtype] += rows
    publish(report(dtype, results[dtype]))
    benchmark.extra_info["of_copy"] = {f"{r['pass']} {r['size']} {r['layout']}": r["of_copy"] for r in rows}


def measured(operator: Operator, dtype: str) -> list[dict[str, Any]]:
    """A row for every size, layout and pass."""
    rows = []
    for size, batch, channels_last in points(DTYPES[dtype]):
        layout = {"size": size, "layout": "channels-last" if channels_last else "contiguous"}
        rows += [
            {"operator": operator.name, "dtype": dtype, **layout, **row}
            for row in passes(operator, Inputs(batch, DTYPES[dtype], "cuda", channels_last))
        ]
        torch.cuda.empty_cache()
    return rows


def points(dtype: torch.dtype) -> list[tuple[str, int, bool]]:
    """What is measured: name of the size, batch, and whether channels-last."""
    room = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / TENSORS / 2**20
    sizes = [(mb, False) for mb in MEGABYTES] + [(CHANNELS_LAST_MEGABYTES, True)]
    return [("CrevNet", CREVNET, False)] + [
        (f"{mb} MB", max(1, round(mb * 2**20 / (ELEMENTS * dtype.itemsize))), channels_last)
        for mb, channels_last in sizes
        if mb < room
    ]


def passes(operator: Operator, made: Inputs) -> list[dict[str, Any]]:
    """Rows of the forward and, if there is one, of the backward pass."""
    torch._dynamo.reset()
    functions = {
        "fused": lambda *tensors: operator.fused(*tensors, backend="triton"),
        "plain": operator.plain,
        "compiled": torch.compile(operator.plain, fullgraph=True, dynamic=False),
    }
    # A compiled backward pass may otherwise reuse the memory of what was saved for it, and runs only once.
    with side_stream(), torch._functorch.config.patch(donated_buffer=False):
        leaves = [operator.leaves(made)]
        first = first_calls(functions["fused"], leaves[0])
        sets = sets_beyond_cache(first["forward"]["bytes"], cache_bytes())
        leaves += [operator.leaves(made) for _ in range(sets - 1)]
        rows = []
        for direction, known in first.items():
            calls = {name: repeated(function, leaves, direction) for name, function in functions.items()}
            rows.append({"pass": direction, **known, "sets": sets, **times(calls, known["bytes"], sets)})
            del calls
        for row in rows:
            row["missed"] = ", ".join(missed(operator, made, row))
    return rows


def first_calls(function: Callable[..., Any], leaves: tuple[torch.Tensor, ...]) -> dict[str, dict[str, Any]]:
    """By pass: the bytes that must be read and written, and how long the first call takes."""
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        seconds, results = timed(lambda: outputs(function(*leaves)))
    found = {"forward": {"bytes": total((*leaves, *results)), "first_call_seconds": seconds}}
    if with_gradients(results):
        grads = [torch.randn_like(t) for t in with_gradients(results)]
        seconds, pulled = timed(lambda: backward(results, leaves, grads))
        found["backward"] = {"bytes": total((*saved, *grads, *pulled)), "first_call_seconds": seconds}
    return found


def repeated(function: Callable[..., Any], leaves: list[tuple[torch.Tensor, ...]], direction: str) -> Call:
    """Calls with the i-th leaves; backward, of forward passes that are done here."""
    if direction == "forward":
        return lambda i: outputs(function(*leaves[i]))
    results = [outputs(function(*mine)) for mine in leaves]
    grads = [[torch.randn_like(t) for t in with_gradients(result)] for result in results]
    return lambda i: backward(results[i], leaves[i], grads[i])


def copies(size: int, sets: int) -> Call:
    """Copies that read and write so many bytes together."""
    half = size // 2
    sources = [torch.empty(half, dtype=torch.uint8, device="cuda").random_() for _ in range(sets)]
    targets = [torch.empty_like(source) for source in sources]
    return lambda i: targets[i].copy_(sources[i])


def times(calls: dict[str, Call], size: int, sets: int) -> dict[str, Any]:
    """What is measured of one pass; times are medians."""
    calls = {**calls, "copy": copies(size, sets)}
    for call in calls.values():
        call(0)
    samples = measure(calls, sets, ROUNDS)
    replayed = {name: s.replayed for name, s in samples.items()}
    on_device = spread([1e6 * s for s in replayed["fused"]])
    return {
        "us": on_device["median"],
        "us_p20": on_device["p20"],
        "us_p80": on_device["p80"],
        **{f"{name}_us": 1e6 * median(s.replayed) for name, s in samples.items() if name != "fused"},
        **{f"{name}_called_us": 1e6 * median(s.called) for name, s in samples.items()},
        "gb_per_second": size / on_device["median"] / 1e3,
        "of_copy": median(ratios(replayed["copy"], replayed["fused"])),
        "plain_of_copy": median(ratios(replayed["copy"], replayed["plain"])),
        "compiled_of_copy": median(ratios(replayed["copy"], replayed["compiled"])),
        "over_plain": median(ratios(replayed["plain"], replayed["fused"])),
        "over_compiled": median(ratios(replayed["compiled"], replayed["fused"])),
    }


def missed(operator: Operator, made: Inputs, row: dict[str, Any]) -> Iterator[str]:
    """Names of the targets that were missed."""
    large = made.batch * ELEMENTS * made.dtype.itemsize >= 0.99 * LARGE * 2**20
    if large and row["of_copy"] < OF_COPY:
        yield "copy"
    if operator.speedup and row["over_plain"] < SPEEDUP:
        yield "plain"
    if row["over_compiled"] < 1 - _NOISE:
        yield "compiled"


def total(tensors: tuple[torch.Tensor, ...]) -> int:
    """Bytes of tensors, each once."""
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())


def median(values: list[float]) -> float:
    """As `spread` has it."""
    return spread(values)["median"]


def report(dtype: str, rows: list[dict[str, Any]]) -> Report:
    """The report of one dtype."""
    columns = {"operator": "operator", "pass": "pass", "size": "size", "layout": "layout"} | {
        "us_p20": "us, p20",
        "us": "median",
        "us_p80": "p80",
        "gb_per_second": "GB/s",
        "of_copy": "of copy",
        "over_plain": "over plain",
        "over_compiled": "over compiled",
        "missed": "missed targets",
        "fused_called_us": "called, us",
        "plain_called_us": "plain called",
        "compiled_called_us": "compiled called",
        "first_call_seconds": "first call, s",
    }
    configuration = {
        "dtype": dtype,
        "megabytes": MEGABYTES,
        "channels_last_megabytes": CHANNELS_LAST_MEGABYTES,
        "batch_of_crevnet": CREVNET,
        "rounds": ROUNDS,
        "l2_bytes": cache_bytes(),
    }
    name = f"gpu_operators_{dtype}"
    rows = joined(name, "rows", rows, ("operator", "pass", "size", "layout"), configuration)
    complete = len(rows) == sum(1 + o.differentiable for o in OPERATORS) * len(points(DTYPES[dtype]))
    pictures = {f"{name}.png": speed_of_operators(rows, dtype)} if complete else {}
    tables = {"rows": Table(f"Operators in {dtype}", columns, rows)}
    title = f"Speed of the operators, {dtype}"
    return Report(name, title, tables, configuration, NOTES, pictures, complete, in_pieces=True, cuda=True)
