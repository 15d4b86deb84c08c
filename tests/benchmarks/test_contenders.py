"""All contenders compute the same, on a small stack."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks import contenders
from benchmarks.contenders import CONTENDERS, STORED, by_revgrad
from benchmarks.engine_measures import counts, relative_error, true_gradient
from benchmarks.engine_workloads import Block, Workload
from revgrad import AdditiveCoupling
from revgrad.message import NOTED

pytestmark = [
    pytest.mark.usefixtures("single_thread"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

EVALUATIONS = {"stored autograd": 1, "memcnn": 1 + 2 * 3 / 4 + 1 / 4, "revgrad float, free budget": 2 - 1 / 8}


def transform():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


SMALL = Workload("small", lambda: Block(transform(), transform()), (64, 6), 1, (4,), "small")


def built(contender, stack, x):
    if contender.package:
        pytest.importorskip(contender.package)
    model = contender.build(stack)
    if contender.measures:
        model(x)
    return model


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
def test_outputs_gradients_and_evaluations(contender):
    stack, x = SMALL.build(4)
    model = built(contender, stack, x)
    exact = contender.name == "revgrad exact"
    torch.testing.assert_close(model(x), STORED.build(stack)(x), rtol=1e-5, atol=1e-3 if exact else 1e-5)
    stack, x = SMALL.build(4)
    found = counts(built(contender, stack, x), stack, x)
    assert relative_error(found.gradient, true_gradient(stack, x)) < (1e-2 if exact else 1e-5)
    assert found.evaluations == EVALUATIONS.get(contender.name, 2)
    assert contender.reversible == (contender.ours or contender.name in ("memcnn", "RevTorch", "revlib"))


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
def test_memory_of_reversible_contenders_is_flat(contender):
    peaks = []
    for depth in (4, 4, 8):  # the first takes what is loaded once
        stack, x = SMALL.build(depth)
        peaks.append(counts(built(contender, stack, x), stack, x, resized=contender.resizes).peak_mib)
    assert (peaks[1] == peaks[2]) == contender.reversible


def test_exact_gradients_are_those_of_stored_autograd_on_the_same_streams():
    stack, x = SMALL.build(4)
    found = {mode: counts(by_revgrad(stack, "exact", mode), stack, x) for mode in ("reversible", "stored")}
    assert torch.equal(found["reversible"].gradient, found["stored"].gradient)
    assert torch.equal(found["reversible"].input_gradient, found["stored"].input_gradient)


def test_versions_of_packages_alone():
    for contender in CONTENDERS:
        if contender.package is None:
            assert contender.version() is None


@pytest.mark.parametrize(
    ("name", "depth", "segments"),
    [("checkpoint per block", 16, 16), ("checkpoint, square root", 16, 4), ("checkpoint, square root", 4, 2)],
)
def test_checkpoints_are_around_every_block_or_as_many_as_the_root_of_them(monkeypatch, name, depth, segments):
    sizes = []
    monkeypatch.setattr(
        contenders,
        "checkpoint",
        lambda run, blocks, *states, **how: sizes.append(len(blocks)) or checkpoint(run, blocks, *states, **how),
    )
    (contender,) = [c for c in CONTENDERS if c.name == name]
    stack, x = SMALL.build(depth)
    contender.build(stack)(x)
    assert sizes == [depth // segments] * segments


@pytest.mark.parametrize("contender", [c for c in CONTENDERS if c.ours], ids=lambda c: c.name)
def test_our_chains_are_past_the_passes_in_which_messages_are_compared(contender):
    """Which take longer, and are a few of the thousands of a training run."""
    stack, _ = SMALL.build(2)
    couplings = [layer for layer in contender.build(stack) if isinstance(layer, AdditiveCoupling)]
    assert [coupling._noted for coupling in couplings] == [NOTED] * 4
