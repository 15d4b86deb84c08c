"""Training steps that never wait for the device, and their graph: all but the capture on CUDA itself.

What would wait is seen without a GPU. Under fake tensors, which have no values, whatever looks at one raises. On the
meta device, what goes from host to device and back is seen by its operators. And a capture that records operators
repeats them as a CUDA graph does, without a line of Python.
"""

import copy
import gc
import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import crevnet.cuda_graph
from crevnet.adam import adam
from crevnet.cuda_graph import GraphedStep
from crevnet.model import CrevNetConfig
from revgrad import DeferredChecks, LiveMemory, ReversibilityError

pytestmark = pytest.mark.usefixtures("single_thread")

FED = [True, True, True, False, True]
OPTIONS = [
    {},
    {"cell_states": "inverted"},
    {"keep_states_every": 2},
    {"clips_at_once": 5},
    {"norm": "batch"},
    {"arithmetic": "float"},
    {"mode": "stored"},
]
CASES = [*(("stlstm", options) for options in OPTIONS), *(("convlstm", options) for options in OPTIONS[:2])]
ALL = pytest.mark.parametrize(
    ("cell", "options"), CASES, ids=["-".join((cell, *map(str, options.values()))) for cell, options in CASES]
)


def small(cell="stlstm", **options):
    how = {"mode": "reversible", "image_size": 16, "clip": 2, "blocks": (1,), "modules": 2} | options
    return CrevNetConfig(cell=cell, **how)


def clips_for(config, batch=2, steps=5):
    return torch.rand(batch, steps + 1, *config.clip_shape())


def backward(model, clips, fed=FED):
    """Loss and gradients of a step."""
    model.zero_grad(set_to_none=True)
    loss = model.loss(clips, fed)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def measured(model, clips, **options):
    checks = DeferredChecks(**options)
    with checks.measuring():
        backward(model, clips)
    model.zero_grad(set_to_none=True)
    return checks


# What waits for nothing


@ALL
def test_nothing_looks_at_a_value(cell, options):
    config = small(cell, **options)
    model, clips = config.build(), clips_for(config)
    checks = measured(model, clips)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(clips)
        if options.get("mode") != "stored" or config.arithmetic == "exact":
            with pytest.raises(DataDependentOutputException):
                backward(model, fake)
        with checks:
            backward(model, fake)
        assert checks.passed().shape == ()


class FromPython(TorchFunctionMode):
    """Notes tensors that are made of Python values, and copied to the device: a capture cannot wait for such a copy."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("tensor", "as_tensor", "new_tensor", "from_numpy"):
            self.found.add(func.__name__)
        return func(*args, **(kwargs or {}))


class Crossings(TorchDispatchMode):
    """Notes operators on tensors of the host."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(x.device.type == "cpu" for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)):
            self.found.add(str(func))
        return out


def test_crossings_are_seen():
    x = torch.ones(2, device="meta")
    with FromPython() as python, Crossings() as host:
        (x + x.new_full((), 2.0)).masked_fill_(x > 0, 2.0)
    assert not host.found | python.found
    with FromPython() as python, Crossings() as host:
        x.new_tensor([1.0, 2.0])
        torch.ones(2).to("meta")
    assert host.found >= {"aten._to_copy.default"}
    assert python.found == {"new_tensor"}


@ALL
def test_nothing_goes_between_host_and_device(cell, options):
    config = small(cell, **options)
    model, clips = config.build(), clips_for(config)
    checks = measured(model, clips)
    model, clips = model.to("meta"), clips.to("meta")
    with checks, FromPython() as python, Crossings() as host:
        backward(model, clips)
        assert not host.found | python.found
        assert checks.passed().device.type == "meta" or not checks._pending


@ALL
def test_gradients_are_those_of_today_and_of_stored_mode_bit_for_bit(cell, options):
    config = small(cell, **options)
    model, clips = config.build(), clips_for(config)
    reference = copy.deepcopy(model)
    checks = measured(copy.deepcopy(model), clips)
    with checks:
        found = backward(model, clips, None)
    checks.raise_if_failed()
    assert all(map(torch.equal, found, backward(reference, clips, None)))
    if config.arithmetic == "exact" and config.norm == "none":
        reference.config = replace(config, mode="stored", keep_states_every=1)
        assert all(map(torch.equal, found, backward(reference, clips, None)))


@pytest.mark.parametrize(("cell", "options"), CASES[1:3], ids=str)
def test_fake_tensors_count_the_bytes_of_real_ones(cell, options):
    """So what such a step takes can be told before anything is computed."""
    config = small(cell, **options)
    model, clips = config.build(), clips_for(config)
    checks = measured(model, clips)

    def peak(model, clips):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        gc.collect()
        with checks, LiveMemory() as memory:
            model.loss(clips, FED).backward()
        checks.forget()
        return memory.peak

    peak(model, clips)  # makes tables that stay
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = peak(config.build(), mode.from_tensor(clips))
    assert fake == peak(model, clips)


# Graphs


class Recorded:
    """What a graph is: the same operators on the same memory, and no Python. Called, it runs them again."""

    def __init__(self, work):
        self.calls = []
        with _Recorder(self.calls):
            work()

    def __call__(self):
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
                for new, old in zip(_tensors(func(*args, **kwargs)), _tensors(out), strict=True):
                    if old.untyped_storage()._cdata not in given:
                        old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        keep = [x.detach() if isinstance(x, torch.Tensor) else x for x in tree_leaves(out)]
        self.calls.append((func, args, kwargs or {}, keep))
        return out


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def run_again(work):
    """A capture that runs the work itself, as often as asked."""
    work()
    return work


CAPTURES = pytest.mark.parametrize("capture", [run_again, Recorded])
RATES = (1e-3, 2e-3, 5e-4)


def adam_of(model, rate=1e-3):
    optimiser = adam(model.parameters(), rate, (0.9, 0.999), capturable=True)
    optimiser.param_groups[0]["lr"] = torch.tensor(rate)
    return optimiser


def plain_step(model, optimiser, clips, rate, clip_norm=0.0):
    """The same step, looking at everything at once."""
    optimiser.param_groups[0]["lr"].fill_(rate)
    loss = backward(model, clips, None)[0]
    grads = [p.grad for p in model.parameters()]
    norm = torch.nn.utils.get_total_norm(grads)
    if clip_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, norm)
    optimiser.step()
    return float(loss), float(norm)


def everything(model, optimiser):
    """Weights, statistics and moments."""
    state = optimiser.state_dict()["state"]
    moments = {f"{name} {i}": x for i, own in state.items() for name, x in own.items()}
    return {name: x.clone() for name, x in (model.state_dict() | moments).items()}


def graphed(model, optimiser, capture=run_again, **options):
    return GraphedStep(model.loss, model, optimiser, capture=capture, **options)


@CAPTURES
@pytest.mark.parametrize(
    ("options", "clip_norm"),
    [({}, 0.0), ({}, 1e-2), ({"norm": "batch", "cell_states": "inverted"}, 0.0), ({"mode": "stored"}, 1e-2)],
)
def test_replayed_steps_are_steps_bit_for_bit(capture, options, clip_norm, tiny):
    config = small("convlstm", **options)
    batches = [clips_for(config) for _ in RATES]
    model, reference = config.build(), config.build()
    reference.load_state_dict(model.state_dict())
    optimisers = adam_of(model), adam_of(reference)
    step = graphed(model, optimisers[0], capture, clip_norm=clip_norm)
    for batch, rate in zip(batches, RATES, strict=True):
        expected = plain_step(reference, optimisers[1], batch, rate, clip_norm)
        assert step(batch, rate) == expected
        tiny.assert_equal(everything(model, optimisers[0]), everything(reference, optimisers[1]))


@pytest.mark.parametrize("cell", ["convlstm", "stlstm"])
def test_what_is_captured_looks_at_no_value_from_the_batch_to_adam(cell, monkeypatch):
    config = small(cell)
    clips = clips_for(config)
    checks = measured(config.build(), clips)
    monkeypatch.setattr(crevnet.cuda_graph, "DeferredChecks", lambda: checks)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = config.build()
        step = graphed(model, adam_of(model), clip_norm=1.0)
        step._batch = clips
        step._work()
        assert step._report.shape == (3,)


def broken(model):
    """Closes gates, and has them close further at every evaluation."""
    attention = model.predictor[1].transform.attention[0]
    plain = attention.forward
    calls = iter(range(10**6))
    attention.forward = lambda x: plain(x) + 0.01 * next(calls)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_check_that_fails_leaves_everything_as_it_was(tiny, norm):
    config = small(norm=norm)
    model = config.build()
    optimiser = adam_of(model)
    step = graphed(model, optimiser)
    step(clips_for(config), 1e-3)
    before = everything(model, optimiser)
    broken(model)
    with pytest.raises(ReversibilityError, match=r"residue|recovered"):
        step(clips_for(config), 1e-3)
    tiny.assert_equal(everything(model, optimiser), before)


@CAPTURES
def test_a_stream_that_leaves_the_grid_is_named(tiny, capture):
    config = small()
    model = config.build()
    optimiser = adam_of(model)
    step = graphed(model, optimiser, capture)
    step(clips_for(config), 1e-3)
    before = everything(model, optimiser)
    with pytest.raises(ReversibilityError, match=r"the input: the stream reached 3.91e"):
        step(clips_for(config).mul_(0).add_(1e6), 1e-3)
    tiny.assert_equal(everything(model, optimiser), before)


@CAPTURES
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(tiny, value, capture):
    config = small(arithmetic="float", mode="stored", norm="batch")
    model = config.build()
    optimiser = adam_of(model)
    step = graphed(model, optimiser, capture, clip_norm=1.0)
    clips = clips_for(config)
    step(clips, 1e-3)
    before = everything(model, optimiser)
    clips[0, -1, 0, 0, 0, 0] = value  # a target alone
    loss, norm = step(clips, 1e-3)
    assert not math.isfinite(loss)
    assert not math.isfinite(norm)
    tiny.assert_equal(everything(model, optimiser), before)


@pytest.mark.parametrize(("capture", "norm"), [(run_again, "none"), (Recorded, "batch")])
def test_a_residue_that_overflows_is_measured_anew_and_the_step_repeated(tiny, capture, norm):
    config = small(norm=norm)
    batches = [clips_for(config) for _ in RATES]
    model, reference = config.build(), config.build()
    reference.load_state_dict(model.state_dict())
    optimisers = adam_of(model), adam_of(reference)
    step = graphed(model, optimisers[0], capture)
    for i, (batch, rate) in enumerate(zip(batches, RATES, strict=True)):
        if i == 1:
            for one in (model, reference):
                with torch.no_grad():
                    for layer in one.predictor:
                        layer.transform.attention[2].bias += 5.0  # gates close
            room = dict(step.checks.capacities)
        assert step(batch, rate) == plain_step(reference, optimisers[1], batch, rate)
        tiny.assert_equal(everything(model, optimisers[0]), everything(reference, optimisers[1]))
    assert all(step.checks.capacities[n] > 2 * room[n] for n in room)


def test_a_batch_of_another_shape():
    config = small(mode="stored")
    model = config.build()
    step = graphed(model, adam_of(model))
    step(clips_for(config), 1e-3)
    with pytest.raises(ValueError, match=r"batches of shape \(2, 6, 1, 2, 16, 16\), got \(1, 6, "):
        step(clips_for(config, batch=1), 1e-3)
