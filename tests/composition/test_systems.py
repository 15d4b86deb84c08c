"""Distributed training, compilation, checkpointing, copies and export."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from revgrad import DeferredChecks, ReversibilityError

pytestmark = [
    pytest.mark.usefixtures("single_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

EXPLAINED = r"compile the transforms inside, or choose mode='stored'"


# Two processes


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """What both ways of two processes find; see distributed.py."""
    folder = tmp_path_factory.mktemp("distributed")
    worker, out = Path(__file__).with_name("distributed.py"), folder / "results.json"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), folder / "store", out],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        logs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(logs)
    return json.loads(out.read_text())


@pytest.mark.composes("Systems", "DistributedDataParallel")
def test_ddp(distributed):
    assert distributed["DDP"] < 1e-12


@pytest.mark.composes("Systems", "DistributedDataParallel, find_unused_parameters=True, with an unused layer")
def test_ddp_with_unused_parameters(distributed):
    assert distributed["DDP find_unused_parameters"] < 1e-12


@pytest.mark.composes("Systems", "DistributedDataParallel, static_graph=True")
def test_ddp_with_a_static_graph(distributed):
    assert distributed["DDP static_graph"] < 1e-12


@pytest.mark.composes("Systems", "DistributedDataParallel, gradient_as_bucket_view=True")
def test_ddp_with_gradients_in_buckets(distributed):
    assert distributed["DDP gradient_as_bucket_view"] < 1e-12


@pytest.mark.composes("Systems", "FSDP2 (fully_shard) of the model")
def test_fsdp_of_the_model(distributed):
    assert distributed["FSDP2 model"] < 1e-12


@pytest.mark.composes("Systems", "FSDP2 (fully_shard) of each sequence")
def test_fsdp_of_sequences(distributed):
    assert distributed["FSDP2 sequences"] < 1e-12


@pytest.mark.parametrize("part", ["couplings", "transforms"])
@pytest.mark.composes(
    "Systems", "FSDP2 (fully_shard) of single layers", "error: *inside the sequence is sharded by itself*"
)
def test_fsdp_of_layers_is_refused(distributed, part):
    assert "inside the sequence is sharded by itself: call fully_shard on the sequence" in distributed[f"FSDP2 {part}"]


# Compilation


class Around(nn.Module):
    """A model around a chain."""

    def __init__(self, chain):
        super().__init__()
        self.chain = chain
        self.stem = nn.Linear(4, 4)

    def forward(self, a, b):
        first, second = self.chain(torch.tanh(self.stem(a)), b)
        return 2 * first, second


@pytest.fixture
def compiling():
    """Nothing compiled before, and what is compiled from here on is counted."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def steps(model, x, check, parameters, count=3):
    """Gradients of several steps, and how many graphs there were after each."""
    found, graphs = [], []
    for _ in range(count):
        found.append(torch.autograd.grad(check.loss(model(*x)), (*x, *parameters)))
        graphs.append(counters["stats"]["unique_graphs"])
    return found, graphs


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
@pytest.mark.composes(
    "Systems", "torch.compile of the transforms inside", "works: compiled once for all layers, no recompilation"
)
def test_compiled_transforms(small, make, check, compiling, arithmetic):
    chain, x = small.chain(12, arithmetic=arithmetic).double(), make.streams(dtype=torch.float64)
    chain.mode = "stored"
    expected = torch.autograd.grad(check.loss(chain(*x)), (*x, *chain.parameters()))
    chain.mode = "reversible"
    for layer in chain:
        layer.transform.compile(backend="aot_eager")
    found, graphs = steps(chain, x, check, list(chain.parameters()))
    for one in found:
        for a, b in zip(one, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert 0 < graphs[0] <= 3
    assert graphs == graphs[:1] * 3
    assert not compiling["graph_break"]


@pytest.mark.composes(
    "Systems", "torch.compile of the model around", "works: the sequence itself runs as it is, between two graphs"
)
def test_compiled_model_around(small, make, check, compiling):
    model, x = Around(small.chain(6)).double(), make.streams(dtype=torch.float64)
    model.chain.mode = "stored"
    expected = torch.autograd.grad(check.loss(model(*x)), (*x, *model.parameters()))
    model.chain.mode = "reversible"
    parameters = list(model.parameters())
    for layer in model.chain:
        layer.transform.compile(backend="aot_eager")
    found, graphs = steps(torch.compile(model, backend="aot_eager"), x, check, parameters)
    for one in found:
        for a, b in zip(one, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert graphs == graphs[:1] * 3
    # What is before and behind the chain; transforms with and without gradients, and of an input without.
    assert graphs[0] == 5
    # Where nothing has run since the compiler was imported, it also finds how revgrad asks it to leave this alone.
    assert all("revgrad" in reason or "qualname: disable" in reason for reason in compiling["graph_break"])


@pytest.mark.parametrize("mode", ["stored", "checkpoint"])
@pytest.mark.parametrize("kind", ["additive", "gated"])
@pytest.mark.parametrize("arithmetic", ["float", "exact"])
@pytest.mark.composes("Systems", "torch.compile of the model around, in stored and checkpoint mode")
def test_compiled_model_in_other_modes(make, check, compiling, arithmetic, kind, mode):
    model = Around(make.chain(kind, 3, arithmetic=arithmetic, mode=mode)).double()
    x, found = make.streams(dtype=torch.float64), []
    for call in (model, torch.compile(model, backend="aot_eager")):
        y = call(*x)
        found.append((*y, *torch.autograd.grad(check.loss(y), (*x, *model.parameters()))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.composes("Systems", "what is saved for backward under torch.compile", "as much at any depth")
def test_compiled_chains_save_no_more_at_any_depth(small, make, compiling):
    x, saved = make.streams(64), {}
    for mode in ("stored", "reversible"):
        for depth in (2, 6):
            model = Around(small.chain(depth, mode=mode))
            theirs = {p.data_ptr() for p in model.parameters()}
            kept = {}

            def pack(t, kept=kept, theirs=theirs):
                if t.data_ptr() not in theirs:
                    kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            for layer in model.chain:
                layer.transform.compile(backend="aot_eager")
            compiled = torch.compile(model, backend="aot_eager")
            compiled(*x)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                y = compiled(*x)
            saved[mode, depth] = sum(kept.values())
            del y
    assert saved["reversible", 2] == saved["reversible", 6] > 0
    assert saved["stored", 6] > 2 * saved["stored", 2]


@pytest.mark.composes(
    "Systems", "torch.compile with fullgraph=True, for training", "error: *compile the transforms inside*"
)
def test_fullgraph_training_says_why_not(small, make, compiling):
    model = torch.compile(Around(small.chain()), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=EXPLAINED):
        model(*make.streams())


@pytest.mark.composes("Systems", "torch.compile with fullgraph=True, for inference or in stored mode")
def test_fullgraph_inference(small, make, compiling):
    model, x = Around(small.chain()), make.streams()
    expected = model(*x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for a, b in zip(compiled(*x), expected, strict=True):
            torch.testing.assert_close(a, b)
    model.chain.mode = "stored"
    for a, b in zip(compiled(*x), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.composes(
    "Systems",
    "CUDA graphs of training",
    "error: *a CUDA graph cannot capture*, unless checks are deferred; the test needs a GPU and has not been run",
)
def test_cuda_graph_is_refused(small, make):
    chain, x = small.chain().cuda(), tuple(t.detach().cuda() for t in make.streams())
    chain(*x)[0].sum().backward()
    torch.cuda.synchronize()
    with (
        pytest.raises(ReversibilityError, match="a CUDA graph cannot capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        chain(*x)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.composes(
    "Systems",
    "CUDA graphs of training, under `DeferredChecks`",
    "should work; without a GPU its operators were recorded and repeated (`crevnet/test_cuda_graph.py`)",
)
def test_cuda_graph_of_training(small, make, check):
    chain, x = small.chain().cuda(), tuple(t.detach().cuda().requires_grad_() for t in make.streams())
    inputs = (*x, *chain.parameters())

    def step():
        return torch.autograd.grad(check.loss(chain(*x)), inputs)

    stream, graph, checks = torch.cuda.Stream(), torch.cuda.CUDAGraph(), DeferredChecks()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        with checks.measuring():
            expected = step()
        with checks:
            step()
        checks.forget()
        with torch.cuda.graph(graph, stream=stream), checks:
            found = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    checks.raise_if_failed()
    assert all(map(torch.equal, found, expected))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.composes("Systems", "CUDA graphs of inference", "should work; the test needs a GPU and has not been run")
def test_cuda_graph_of_inference(small, make):
    chain, x = small.chain().cuda(), tuple(t.detach().cuda() for t in make.streams())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        expected = chain(*x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = chain(*x)
    graph.replay()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.composes("Systems", "torch.export of inference, with and without no_grad")
def test_export(small, make, strict, enabled, compiling):
    model, x = Around(small.chain()).eval(), make.streams(requires_grad=False)
    with torch.set_grad_enabled(enabled):
        program = torch.export.export(model, x, strict=strict)
    other = make.streams(requires_grad=False)
    for a, b in zip(program.module()(*other), model(*other), strict=True):
        torch.testing.assert_close(a, b)


# Checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.composes("Systems", "torch.utils.checkpoint around the sequence, both ways")
def test_checkpoint_around(make, check, reentrant):
    chain, x = make.chain("mixed", 4, inner=lambda: nn.Dropout(0.3)), make.streams()
    found = []
    for around in (False, True):
        model = copy.deepcopy(chain)
        inputs = tuple(t.detach().clone().requires_grad_() for t in x)
        torch.manual_seed(3)
        y = checkpoint(model, *inputs, use_reentrant=reentrant) if around else model(*inputs)
        check.loss(y).backward()
        found.append(dict(enumerate(t.grad for t in (*inputs, *model.parameters()))))
    check.same(*found)


class Checkpointed(nn.Module):
    def __init__(self, net, reentrant):
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


@pytest.mark.composes("Systems", "torch.utils.checkpoint inside a transform, use_reentrant=False")
def test_checkpoint_inside(small, make, as_stored):
    as_stored(small.of(lambda: Checkpointed(small.net(), False)), make.streams())


@pytest.mark.composes(
    "Systems", "torch.utils.checkpoint inside a transform, use_reentrant=True", "error: *When use_reentrant=True*"
)
def test_reentrant_checkpoint_inside(small, make, check):
    chain = small.of(lambda: Checkpointed(small.net(), True))
    loss = check.loss(chain(*make.streams()))
    with pytest.raises(RuntimeError, match="set use_reentrant=False"):
        loss.backward()
    assert all(p.grad is None for p in chain.parameters())


@pytest.mark.composes("Systems", "saved_tensors_hooks around (save_on_cpu, packing)")
def test_saved_tensors_hooks(small, make, check):
    chain, x = small.chain().double(), make.streams(dtype=torch.float64)
    expected = torch.autograd.grad(check.loss(chain(*x)), (*x, *chain.parameters()))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        y = chain(*x)
    assert packed
    assert all(map(torch.equal, torch.autograd.grad(check.loss(y), (*x, *chain.parameters())), expected))


# Copies


@pytest.mark.parametrize("mode", ["stored", "checkpoint", "reversible"])
@pytest.mark.composes("Systems", "pickle, after a step")
def test_pickle(make, check, mode):
    chain, x = make.chain("mixed", 4, mode=mode), make.streams()
    expected = check.gradients(chain, x)
    check.loss(chain(*x)).backward()
    again = pickle.loads(pickle.dumps(chain))
    assert again.mode == mode
    again.zero_grad()
    check.same(check.gradients(again, x), expected)


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
@pytest.mark.composes("Systems", "NaN in the input", "passes through, as in stored mode")
def test_nan_passes_through(small, make, check, mode):
    chain, x = small.chain().double(), make.streams(dtype=torch.float64)
    with torch.no_grad():
        x[0][1, 2] = torch.nan
    expected, found = (check.gradients(chain, x, m) for m in ("stored", mode))
    assert expected["output 0"][1].isnan().all()
    assert expected["gradient of input 0"][0].isfinite().all()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], equal_nan=True)
