"""Plans, beside what `LiveMemory` counts in a real run."""

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from revgrad import AdditiveCoupling, Inverse, LiveMemory, StreamError, plan
from tests.revgrad.test_cost import CHAINS, Told

pytestmark = pytest.mark.usefixtures("single_thread", "warm")


def held(model, x, mode, budget=None):
    model.mode, model.memory_budget = mode, budget
    model(*x)
    with LiveMemory() as memory:
        y = model(*x)
        found = memory.live
        del y
    return found


@pytest.mark.parametrize("name", [*CHAINS, "additive", "affine"])
def test_bytes_agree_with_a_real_run(make, name):
    model, x = CHAINS[name]() if name in CHAINS else (make.chain(name, 8), make.streams(64))
    found = plan(model, x)
    assert found.stored.kept_bytes == pytest.approx(held(model, x, "stored"), rel=0.02)
    assert found.checkpoint.kept_bytes == pytest.approx(held(model, x, "checkpoint"), rel=0.02)
    assert found.reversible.kept_bytes == pytest.approx(held(model, x, "reversible"), rel=0.02)
    room = found.stored.kept_bytes - found.reversible.kept_bytes
    for budget in (room // 2, f"{room * 3 // 4} B", "free"):
        (way,) = plan(model, x, budgets=[budget]).budgeted
        assert way.kept_bytes == pytest.approx(held(model, x, "reversible", budget), rel=0.02)
        assert found.reversible.kept_bytes < way.kept_bytes <= found.reversible.kept_bytes + room * 3 // 4
        assert sum(model._stored_layers.popitem()[1]) == way.stored_layers


def test_exact_bytes_without_the_spilled_bits(make):
    model, x = make.chain("gated", 8), make.streams(64)
    found = plan(model, x)
    assert found.stored.kept_bytes == pytest.approx(held(model, x, "stored"), rel=0.02)
    spilled = held(model, x, "reversible") - found.reversible.kept_bytes
    assert 0 <= spilled < 1.5 / 8 * 64 * 4 * 8
    assert "Not counted are the bits" in str(found)
    assert "Not counted" not in str(plan(make.chain("additive", 2), x))


@pytest.mark.parametrize("name", CHAINS)
def test_flops(name):
    model, x = CHAINS[name]()
    found = plan(model, x)
    assert found.stored.extra_flops == 0
    assert found.reversible.extra_flops == found.checkpoint.extra_flops == found.forward_flops > 0
    assert found.step_flops(found.stored) == 1
    assert found.step_flops(found.reversible) == pytest.approx(4 / 3)
    extra = [way.extra_flops for way in found.budgeted]
    assert extra == sorted(extra, reverse=True)
    assert extra[-1] < found.forward_flops


def test_nothing_is_computed_or_changed(make):
    model, x = CHAINS["convolutions"]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    y = model(*x)  # running statistics move, and what autograd has saved must not
    after = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    plan(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, model.state_dict().values(), after.values()))
    assert not all(map(torch.equal, before.values(), after.values()))
    y.sum().backward()
    assert not any(isinstance(p.grad, FakeTensor) for p in model.parameters())


@pytest.mark.parametrize("kind", ["additive", "gated"])
def test_a_plan_leaves_exact_arithmetic_working(make, check, kind):
    model, x = make.chain(kind, 4, arithmetic="exact"), make.streams()
    plan(model, x)
    check.same(check.gradients(model, x), check.gradients(model, x, "stored"))


def test_inputs_larger_than_any_memory(make):
    model = make.chain("additive", 4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2**40, 4), torch.empty(2**40, 4)
    found = plan(model, x)
    assert found.reversible.kept_bytes == 2 * 2**40 * 4 * 4 + 2 * 24
    assert "32.0 TiB" in str(found)


@pytest.mark.parametrize("kind", ["additive", "gated"])
@pytest.mark.parametrize("weights", ["cpu", "meta"])
def test_inputs_on_the_meta_device(make, kind, weights):
    expected = plan(make.chain(kind, 4), make.streams())
    x = tuple(t.to("meta") for t in make.streams())
    assert plan(make.chain(kind, 4).to(weights), x) == expected


def test_states(make):
    model, x = make.recurrent("additive", 3), make.streams()
    state = make.state(model)
    assert plan(model, x, state).stored.kept_bytes > 0
    with pytest.raises(StreamError, match="is stateful, but no state was given"):
        plan(model, x)


def test_conditioning(make):
    x, context = make.streams(64), torch.randn(64, 4)
    found = plan(AdditiveCoupling(Told(4)), x, conditioning={"context": context})
    # The gradient of the product needs the context, which is the caller's, and not the result.
    assert found.stored.kept_bytes == 64 * 4 * 4
    with pytest.raises(StreamError, match="no layer of the chain takes an argument 'hint'"):
        plan(AdditiveCoupling(Told(4)), x, conditioning={"hint": context})


def test_budgets(make):
    x = make.streams()
    model = make.chain("additive", 4)
    assert len(plan(model, x).budgeted) == 3
    model.memory_budget = "1 KiB"
    assert [way.name for way in plan(model, x).budgeted] == ["budget 1 KiB"]
    assert [way.name for way in plan(model, x, budgets=[1536]).budgeted] == ["budget 1.5 KiB"]
    assert plan(model, x, budgets=()).budgeted == ()
    assert plan(model, x, budgets="2 KiB") == plan(model, x, budgets=["2 KiB"])
    assert plan(model, x, budgets=2048) == plan(model, x, budgets=[2048])
    with pytest.raises(StreamError, match="memory_budget must be"):
        plan(model, x, budgets=["much"])


def test_anchors_count(make):
    x = make.streams(64)
    free, anchored = (plan(make.chain("additive", 4, anchor_every=n), x).reversible for n in (None, 2))
    assert anchored.kept_bytes - free.kept_bytes == 2 * 64 * 4 * 4


def test_an_inverse_has_the_options_of_its_chain(make):
    chain = make.chain("additive", 4, memory_budget="1 KiB")
    assert [way.name for way in plan(Inverse(chain), make.streams(64)).budgeted] == [
        way.name for way in plan(chain, make.streams(64)).budgeted
    ]


def test_reads_well(make):
    text = str(plan(make.chain("additive", 4), make.streams(512), budgets=["20 KiB"]))
    assert text.splitlines() == [
        "way                  kept  evaluated again    step  layers stored",
        "stored           96.0 KiB           0 FLOP  1.000x     4 of 4",
        "checkpoint       32.0 KiB      262.1 kFLOP  1.333x     0 of 4",
        "reversible       16.0 KiB      262.1 kFLOP  1.333x     0 of 4",
        "budget 20 KiB    32.0 KiB      196.6 kFLOP  1.250x     1 of 4",
        "kept: bytes between forward and backward pass; step: FLOPs over those of stored autograd.",
        "On top come gradients and, where layers are evaluated again, the graph of one: 24.0 KiB at most.",
    ]


def test_a_lone_layer(make):
    found = plan(AdditiveCoupling(make.net(4)), make.streams())
    assert (found.layers, found.stored.stored_layers) == (1, 1)


def test_a_transform_that_looks_at_values_says_so(make):
    class Picky(torch.nn.Module):
        def forward(self, x):
            return x * 2 if x.max() > 1 else x

    with pytest.raises(RuntimeError):
        plan(AdditiveCoupling(Picky()), make.streams())
