"""The kernels' tests on a GPU: `pytest benchmarks/gpu/test_correctness.py --benchmark-only`.

And what only a GPU can show: tensors of more than 2^31 elements, CUDA graphs, of whole training steps too,
`torch.compile` with its own compiler, a second device. `-k` may cut the run into pieces: outcomes are added to those of
earlier runs.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from revgrad_kernels import pixel_shuffle, pixel_unshuffle, weighted_sum
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.operators import OPERATORS, STREAM, Inputs, Operator, outputs, with_gradients
from benchmarks.gpu.pieces import joined
from benchmarks.gpu.pytest_summary import ROOT, Run, run_files
from benchmarks.reporting import Report, Table
from benchmarks.training import CELLS, Variant, random_clips
from crevnet.adam import adam
from crevnet.capture import captured, side_stream
from crevnet.cuda_graph import GraphedStep
from crevnet.model import CrevNetConfig
from crevnet.video_model import VideoModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH = 16
MANY = 2**31
TIMEOUT = 500.0
"""Seconds for one test file."""
FILES = [*sorted((ROOT / "tests" / "kernels").glob("test_*.py")), ROOT / "tests" / "crevnet" / "test_kernels.py"]
NAMES = [str(file.relative_to(ROOT)) for file in FILES if file.exists()]
WAYS = (
    *(Variant("reversible"), Variant("reversible", cell_states="inverted"), Variant("reversible", keep_states_every=3)),
    *(Variant("reversible", "float"), Variant("stored"), Variant("stored", "float")),
)
TRAINED = [(cell, variant) for cell in CELLS for variant in WAYS]
RATES = (1e-3, 2e-3, 5e-4, 1e-3)
POINTS = [(o, dtype) for o in OPERATORS for dtype in DTYPES]
COLUMNS = {"files": ("file",), "checks": ("check", "operator", "dtype")}
IDS = [f"{o.name}-{dtype}" for o, dtype in POINTS]

NOTES = (
    "Tests: the kernels' tests and those of CrevNet with kernels, each file in a process of its own, several at once.",
    "CUDA graph: forward and backward pass are captured and replayed with other inputs; the bits are those of the "
    "same passes without a graph.",
    "Training step, CUDA graph: forward, backward and Adam are replayed from one graph; the bits of weights and of "
    "moments after several steps are those without a graph and with checks at once. cuDNN is deterministic.",
    "torch.compile: with its default backend and without a graph break; the bits are those without it, but "
    "for gradients of biases and peepholes: they are sums, which a compiler takes in an order of its own.",
    "More than 2^31 elements: pixel shuffle of bytes, compared as a whole; weighted sum and its gradients in bfloat16, "
    "compared with the reference at both ends and around 2^31.",
)


@pytest.fixture(scope="module")
def measured() -> dict[str, list[dict[str, Any]]]:
    """The rows of this run."""
    return {"files": [], "checks": []}


@pytest.fixture
def results(publish, measured) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Written after every test: whatever cuts a run off, what it has found is kept."""
    yield measured
    publish(report(measured))


def report(measured: dict[str, list[dict[str, Any]]]) -> Report:
    """What is known by now."""
    configuration = {"files": NAMES, "batch": BATCH, "devices": torch.cuda.device_count()}
    rows = {
        key: joined("gpu_correctness", key, measured[key], columns, configuration) for key, columns in COLUMNS.items()
    }
    files = {key: key for key in ("file", "passed", "failed", "skipped", "errors", "seconds")}
    checks = {key: key for key in ("check", "operator", "dtype", "outcome")}
    tables = {
        "files": Table("Tests on the device", files, rows["files"]),
        "checks": Table("Checks that need a device", checks, rows["checks"]),
    }
    checked = 2 * len(POINTS) + len(TRAINED) + 1 + len(LARGE)
    complete = len(rows["files"]) == len(NAMES) and len(rows["checks"]) == checked
    return Report(
        "gpu_correctness",
        "Kernels on a GPU",
        tables,
        configuration,
        NOTES,
        complete=complete,
        in_pieces=True,
        cuda=True,
    )


@pytest.fixture
def check(results) -> Iterator[Callable[..., None]]:
    """Record the outcome of a check, whatever it is."""

    def run(name: str, operator: str, dtype: str, work: Callable[[], None]) -> None:
        row = {"check": name, "operator": operator, "dtype": dtype, "outcome": "FAILED"}
        results["checks"].append(row)
        try:
            work()
        except pytest.skip.Exception as reason:
            row["outcome"] = f"skipped: {reason}"
            raise
        row["outcome"] = "passed"

    return run


def test_files(benchmark, results):
    runs: list[Run] = benchmark.pedantic(run_files, (NAMES, TIMEOUT), rounds=1)
    for run in runs:
        results["files"].append({"file": run.file, **run.counts, "seconds": run.seconds})
    failed = [run for run in runs if not run.good]
    assert not failed, "\n\n".join(f"{run.file}:\n{run.output[-3000:]}" for run in failed)


@pytest.mark.parametrize(("operator", "dtype"), POINTS, ids=IDS)
def test_graph_replays_what_is_computed_without(benchmark, check, operator, dtype):
    once(benchmark, check, "CUDA graph", operator.name, dtype, lambda: capture_and_replay(operator, DTYPES[dtype]))


def capture_and_replay(operator: Operator, dtype: torch.dtype) -> None:
    """Capture, change the inputs, replay, compare."""
    made = Inputs(BATCH, dtype, "cuda")
    with side_stream():
        leaves = operator.leaves(made)
        grads = [torch.randn_like(t) for t in with_gradients(outputs(fused(operator)(*leaves)))]

        def work() -> tuple[Tensor, ...]:
            return both_passes(fused(operator), leaves, grads)

        work()
        replay = captured(work)
        with torch.no_grad():
            for leaf, other in zip(leaves, operator.inputs(made), strict=True):
                leaf.copy_(other)
        assert_same_bits(replay(), work())


@pytest.mark.parametrize(("cell", "variant"), TRAINED, ids=str)
def test_graph_of_training_steps_trains_as_without(benchmark, check, cell, variant):
    name = f"CrevNet, {cell}, {variant}"
    once(benchmark, check, "training step, CUDA graph", name, "float32", lambda: train_both_ways(cell, variant))


def train_both_ways(cell: str, variant: Variant) -> None:
    """Losses, norms of gradients, weights and moments."""
    config = variant.of(CrevNetConfig(cell=cell, image_size=32, modules=4))
    torch.manual_seed(0)
    model = config.build().cuda()
    reference = copy.deepcopy(model)
    optimiser, its_own = (adam(m.parameters(), RATES[0], (0.9, 0.999), capturable=True) for m in (model, reference))
    its_own.param_groups[0]["lr"] = torch.tensor(RATES[0], device="cuda")
    step = GraphedStep(model.loss, model, optimiser, clip_norm=1.0)
    tf32 = torch.backends.cudnn.allow_tf32
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32):
        for rate in RATES:
            clips = random_clips(config, 4, 6).cuda()
            assert step(clips, rate) == plain_step(reference, its_own, clips, rate)
    assert_same_bits(model.parameters(), reference.parameters())
    moments = [[x for own in a.state_dict()["state"].values() for x in own.values()] for a in (optimiser, its_own)]
    assert_same_bits(*moments)


def plain_step(model: VideoModel, adam: torch.optim.Adam, clips: Tensor, rate: float) -> tuple[float, float]:
    """A training step without a graph; the loss and the norm of the gradient."""
    adam.param_groups[0]["lr"].fill_(rate)
    adam.zero_grad()
    loss = model.loss(clips)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
    return float(loss.detach()), float(norm)


@pytest.mark.parametrize(("operator", "dtype"), POINTS, ids=IDS)
def test_compiled_computes_what_is_computed_without(benchmark, check, operator, dtype):
    once(benchmark, check, "torch.compile", operator.name, dtype, lambda: compiled(operator, DTYPES[dtype]))


def compiled(operator: Operator, dtype: torch.dtype) -> None:
    """Compare with and without compilation."""
    torch._dynamo.reset()
    leaves = operator.leaves(Inputs(BATCH, dtype, "cuda"))
    grads = [torch.randn_like(t) for t in with_gradients(outputs(fused(operator)(*leaves)))]
    functions = (torch.compile(fused(operator), fullgraph=True), fused(operator))
    (found, sums), (expected, expected_sums) = (summed_apart(function, leaves, grads) for function in functions)
    assert_same_bits(found, expected)
    for one, other in zip(sums, expected_sums, strict=True):
        torch.testing.assert_close(one, other)


def summed_apart(function: Callable[..., Any], leaves: Any, grads: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients; and those gradients that are sums over the batch, which a compiler takes in its order."""
    every = both_passes(function, leaves, grads)
    like = (*outputs(function(*leaves)), *(with_gradients(leaves) if grads else ()))
    sums = [x for x, one in zip(every, like, strict=True) if len(one) != BATCH]
    return [x for x in every if all(x is not one for one in sums)], sums


def test_another_device_than_the_current_one(benchmark, check):
    once(benchmark, check, "second device", "all", "both", elsewhere)


def elsewhere() -> None:
    """Compare two devices, the first of which is the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    for operator, dtype in POINTS:
        leaves = operator.leaves(Inputs(BATCH, DTYPES[dtype], "cuda:0"))
        grads = [torch.randn_like(t) for t in with_gradients(outputs(fused(operator)(*leaves)))]
        moved = tuple(t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in leaves)
        found = both_passes(fused(operator), moved, [t.to("cuda:1") for t in grads])
        assert all(t.device.index == 1 for t in found)
        assert_same_bits([t.to("cuda:0") for t in found], both_passes(fused(operator), leaves, grads))


def large_pixel_shuffle() -> None:
    """The bits of PyTorch's own; and back."""
    shape = (MANY // (8 * 64 * 64) + 1, 8, 64, 64)
    need(6, shape, torch.int8)
    x = torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")
    folded = pixel_unshuffle(x, 2, backend="triton")
    assert torch.equal(folded, F.pixel_unshuffle(x, 2))
    assert torch.equal(pixel_shuffle(folded, 2, backend="triton"), x)


def large_weighted_sum() -> None:
    """The reference's numbers, in the first and last sequences and in those where 2^31 lies."""
    shape = (MANY // Inputs(1).feature().numel() + 2, *STREAM)
    need(10, shape, torch.bfloat16)
    leaves = [torch.randn(shape, dtype=torch.bfloat16, device="cuda").requires_grad_() for _ in range(3)]
    grad = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    found = both_passes(lambda *t: weighted_sum(*t, backend="triton"), leaves, [grad])
    for part in (slice(0, 2), slice(-4, None)):
        some = [t.detach()[part].requires_grad_() for t in leaves]
        expected = both_passes(lambda *t: weighted_sum(*t, backend="reference"), some, [grad[part]])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[part], other, rtol=2e-2, atol=2e-2)


LARGE = {"pixel_unshuffle": ("int8", large_pixel_shuffle), "weighted_sum": ("bfloat16", large_weighted_sum)}


@pytest.mark.parametrize("operator", LARGE)
def test_more_elements_than_32_bits_count(benchmark, check, operator):
    dtype, work = LARGE[operator]
    try:
        once(benchmark, check, "more than 2^31 elements", operator, dtype, work)
    finally:
        torch.cuda.empty_cache()


def need(tensors: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Skip unless there is room for so many tensors."""
    wanted, free = tensors * torch.Size(shape).numel() * dtype.itemsize, torch.cuda.mem_get_info()[0]
    if free < wanted:
        pytest.skip(f"needs {wanted / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free")


def fused(operator: Operator) -> Callable[..., Any]:
    """The operator by its kernels."""
    return lambda *tensors: operator.fused(*tensors, backend="triton")


def both_passes(function: Callable[..., Any], leaves: Any, grads: Any) -> tuple[Tensor, ...]:
    """Results and gradients."""
    results = outputs(function(*leaves))
    pulled = torch.autograd.grad(with_gradients(results), with_gradients(leaves), grads) if grads else ()
    return *(t.detach() for t in results), *pulled


def assert_same_bits(found: Any, expected: Any) -> None:
    """Every tensor equal."""
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), f"tensor {i}: off by {float((one.double() - other.double()).abs().max()):.3g}"


def once(benchmark, check, name: str, operator: str, dtype: str, work: Callable[[], None]) -> None:
    """Run a check; pytest-benchmark shows how long it took."""
    benchmark.pedantic(check, (name, operator, dtype, work), rounds=1)
