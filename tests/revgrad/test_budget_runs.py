"""Chains with a memory budget: what that takes, and that nothing else changes."""

import copy
import gc
import itertools

import pytest
import torch
from torch import nn

from revgrad import AdditiveCoupling, GatedCoupling, LiveMemory, ReversibilityError, ReversibleSequential, plan
from revgrad.budget import run_partly_stored
from revgrad.chain import stateless
from revgrad.cost import measure
from tests.revgrad.test_budget import BATCH, LOTS, STREAM, WIDTH, drawn
from tests.revgrad.test_cost import CHAINS

pytestmark = pytest.mark.usefixtures("single_thread", "warm")


def real(kind, make, **options):
    """A chain with all that must be replayed: normalisation and dropout."""
    return make.chain(
        kind, 6, WIDTH, inner=lambda: nn.Sequential(nn.BatchNorm1d(2 * WIDTH), nn.Dropout(0.3)), **options
    )


BUDGETS = [6 * STREAM, 12 * STREAM, 20 * STREAM, LOTS]


@pytest.mark.composes("Modes", "a memory budget, with dropout and BatchNorm", "works: the same bits where exact")
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", ["additive", "gated", "mixed"])
def test_exact_gradients_are_those_of_stored_layers(make, check, kind, budget):
    model, x = real(kind, make, arithmetic="exact"), make.streams(BATCH, WIDTH)
    expected = check.gradients(model, x, "stored")
    model.memory_budget = budget
    check.same(check.gradients(model, x), expected)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", ["additive", "affine", "gated"])
def test_float_gradients_are_those_of_stored_layers(make, check, kind, budget):
    model, x = real(kind, make, arithmetic="float"), make.streams(BATCH, WIDTH)
    expected = check.gradients(model, x, "stored")
    model.memory_budget = budget
    found = check.gradients(model, x)
    check.same(found, expected, rtol=1e-3)
    for name in (*(n for n in found if n.startswith("buffer")), "output 0", "output 1"):
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("carries", [0, 1])
@pytest.mark.parametrize("kind", ["additive", "gated"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_states_go_through_all_runs(make, check, kind, carries, budget):
    model, x = make.recurrent(kind, 5, WIDTH, carries=carries, arithmetic="exact"), make.streams(BATCH, WIDTH)
    state = make.state(model, BATCH, WIDTH, requires_grad=True)
    found = {}
    for mode in ("stored", "reversible"):
        model.mode = mode
        model.memory_budget = budget if mode == "reversible" else None
        y, new = model(*x, states=state)
        loss = check.loss(y) + check.loss(tuple(new.tensors()))
        grads = torch.autograd.grad(loss, [*x, *state.tensors(), *model.parameters()])
        found[mode] = dict(enumerate([*y, *new.tensors(), *grads]))
    check.same(found["reversible"], found["stored"])


@pytest.mark.parametrize(
    ("kind", "arithmetic", "anchor_every"),
    [("additive", "float", None), ("affine", "float", 2), ("additive", "exact", None), ("additive", "exact", 2)],
)
def test_every_cut_keeps_what_its_cost_says(make, kind, arithmetic, anchor_every):
    cls = type(make.coupling(kind))
    # One stream is never updated, and one only in the end.
    places = [(0, 1), (0, 1), (1, 0), (0, 1), (2, 1), (0, 2)]
    layers = [cls(make.coupling(kind).transform, *place) for place in places]
    program = ReversibleSequential(*layers, arithmetic=arithmetic, anchor_every=anchor_every)._program({}, None)
    x, state = make.streams(BATCH, WIDTH, count=4), stateless(program.core)
    cost = measure(program, x, state)
    gc.collect()
    for stored in itertools.product([False, True], repeat=len(places)):
        with LiveMemory() as memory:
            y, _ = run_partly_stored(program, x, state, stored)
            assert memory.live == cost.kept(stored, anchor_every), drawn(stored)
            del y
            assert memory.live == 0


@pytest.mark.parametrize("part", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("name", CHAINS)
def test_architectures(check, name, part):
    """Shared weights, an inverse, streams that are views, frozen weights, two backward passes through one graph."""
    model, x = CHAINS[name]()
    model.arithmetic = "exact"
    next(layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)).requires_grad_(False)
    expected = check.gradients(model, x, "stored")
    found = plan(model, x)
    model.memory_budget = round(part * (found.stored.kept_bytes - found.reversible.kept_bytes))
    check.same(check.gradients(model, x), expected)
    assert 0 < plan(model, x).budgeted[0].stored_layers < found.layers
    model(*x), model(*x)
    assert len(model._stored_layers) == 1  # also where layers are made anew, as those of an inverse are
    y = model(x[0].detach())  # an input without gradient
    once = torch.autograd.grad(check.loss(y), [p for p in model.parameters() if p.requires_grad], retain_graph=True)
    twice = torch.autograd.grad(check.loss(y), [p for p in model.parameters() if p.requires_grad])
    check.same(dict(enumerate(twice)), dict(enumerate(once)))


class Told(nn.Module):
    """A transform with an argument."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, context, scale=1.0):
        return torch.tanh(self.linear(x) * context) * scale


@pytest.mark.composes("Conditioning", "a memory budget")
@pytest.mark.parametrize("budget", BUDGETS)
def test_conditioning_goes_to_all_runs(make, check, budget):
    layers = [AdditiveCoupling(Told(), i % 2, 1 - i % 2) for i in range(6)]
    model = ReversibleSequential(*layers, arithmetic="exact")
    x, context = make.streams(BATCH, WIDTH), torch.randn(BATCH, WIDTH, requires_grad=True)
    per_layer = [None, {"scale": 2.0}, None, None, {"scale": 0.5, "context": context.detach()}, None]
    found = {}
    for mode in ("stored", "reversible"):
        model.mode, model.memory_budget = mode, budget if mode == "reversible" else None
        y = model(*x, context=context, per_layer=per_layer)
        grads = torch.autograd.grad(check.loss(y), [*x, *model.parameters(), context])
        found[mode] = dict(enumerate([*y, *grads[:-1]]))
        found[mode]["context"] = grads[-1]
    context_grads = [f.pop("context") for f in found.values()]
    check.same(found["reversible"], found["stored"])
    # A tensor that many layers read: its gradient is added up in another order.
    torch.testing.assert_close(*context_grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"anchor_every": 1}, {"drift_guard": True}])
def test_with_anchors_and_the_guard(make, check, options):
    model, x = make.chain("affine", 6, WIDTH, memory_budget=10 * STREAM, **options), make.streams(BATCH, WIDTH)
    check.same(check.gradients(model, x), check.gradients(model, x, "stored"), rtol=1e-4)


@pytest.mark.composes("Modes", "a memory budget under autocast")
def test_under_autocast(make, check):
    model, x = make.chain("additive", 6, WIDTH, memory_budget=8 * STREAM), make.streams(BATCH, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = check.gradients(model, x, "stored")
        found = check.gradients(model, x)
    check.same(found, expected, rtol=1e-2)


def test_memory_is_what_was_promised(make, check):
    held, peak = {}, {}
    for budget in (0, 3, 6, 9, 12, 15, 1000):
        torch.manual_seed(0)
        model = make.chain("additive", 8, WIDTH, memory_budget=budget * STREAM).requires_grad_(True)
        x = make.streams(BATCH, WIDTH)
        for leaf in (*model.parameters(), *x):
            leaf.grad = torch.zeros_like(leaf)
        model(*x)  # measures
        gc.collect()
        with LiveMemory() as memory:
            y = model(*x)
            held[budget] = memory.live
            loss = check.loss(y)
            del y
            loss.backward()
            peak[budget] = memory.peak
            del loss
        assert 0 <= held[budget] - held[0] <= budget * STREAM
        assert peak[budget] - peak[0] <= budget * STREAM
    sizes = list(held.values())
    assert sizes == sorted(sizes)
    assert len(set(sizes)) >= 5


@pytest.mark.parametrize(
    ("kind", "arithmetic", "slack"),
    [
        ("additive", "float", 0),
        ("affine", "float", 0),
        ("gated", "float", 8),
        ("additive", "exact", 0),
        ("gated", "exact", 0),
    ],
)
def test_free_layers_leave_the_peak_where_it_is(make, check, kind, arithmetic, slack):
    peak, calls, gradients = {}, {}, {}
    for budget in (None, "free"):
        torch.manual_seed(0)
        model, x = make.chain(kind, 6, WIDTH, arithmetic=arithmetic, memory_budget=budget), make.streams(BATCH, WIDTH)
        for leaf in (*model.parameters(), *x):
            leaf.grad = torch.zeros_like(leaf)
        model(*x)  # measures
        before = [layer.transform.count[0] for layer in model]
        gc.collect()
        with LiveMemory() as memory:
            check.loss(model(*x)).backward()
        peak[budget] = memory.peak
        calls[budget] = [layer.transform.count[0] - n for layer, n in zip(model, before, strict=True)]
        gradients[budget] = {name: p.grad for name, p in model.named_parameters()}
    assert calls == {None: [2] * 6, "free": [2] * 5 + [1]}
    assert peak["free"] <= peak[None] + slack
    check.same(gradients["free"], gradients[None], rtol=0 if arithmetic == "exact" else 1e-4)


def test_stored_layers_are_evaluated_once(make, check):
    model, x = make.chain("additive", 6, WIDTH, memory_budget=8 * STREAM), make.streams(BATCH, WIDTH)
    check.loss(model(*x)).backward()
    (stored,) = model._stored_layers.values()
    assert 0 < sum(stored) < 6
    assert [layer.transform.count[0] for layer in model] == [1 if s else 2 for s in stored]


def test_measured_once_per_kind_of_input(make):
    model = make.chain("additive", 4, WIDTH, memory_budget=LOTS)
    for batch in (8, 8, 16, 8):
        model(*make.streams(batch, WIDTH))
    assert len(model._stored_layers) == 2
    model.eval()
    model(*make.streams(8, WIDTH))
    model[0].requires_grad_(False)
    model(*make.streams(8, WIDTH))
    with torch.no_grad():
        model(*make.streams(99, WIDTH))
    model.memory_budget = "1 KB"
    model(*make.streams(8, WIDTH))
    assert len(model._stored_layers) == 5


def test_a_wrong_inverse_between_stored_layers_is_found(make, check):
    class Wrong(AdditiveCoupling):
        def unmerge(self, merged, *message):
            return merged - 1.1 * message[0]

    class Large(nn.Module):
        """So large a graph that it is not stored."""

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(WIDTH, 999), nn.Tanh(), nn.Linear(999, WIDTH))

        def forward(self, x):
            return self.net(x)

    layers = [make.coupling("additive", WIDTH, i) for i in range(5)]
    layers[2] = Wrong(Large(), 0, 1)
    model = ReversibleSequential(*layers, memory_budget=40 * STREAM)
    y = model(*make.streams(BATCH, WIDTH))
    assert drawn(*model._stored_layers.values()) == "ssrss"
    with pytest.raises(ReversibilityError, match="the input recovered in the backward pass differs"):
        check.loss(y).backward()


def test_copies_measure_for_themselves(make, check):
    model, x = make.chain("additive", 4, WIDTH, memory_budget=LOTS), make.streams(BATCH, WIDTH)
    model(*x)
    other = copy.deepcopy(model)
    check.same(check.gradients(other, x), check.gradients(model, x))


def test_empty_chain(make):
    x = make.streams()
    assert all(map(torch.equal, ReversibleSequential(memory_budget=LOTS)(*x), x))


class Reading(nn.Module):
    """Multiplies by a tensor that comes by way of a closure."""

    def __init__(self, weight):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.read = lambda: weight

    def forward(self, x):
        return torch.tanh(self.linear(x) * self.read())


@pytest.mark.composes("Misuse", "a closure in a frozen layer in front of those that a budget stores", "works")
@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_a_closure_in_a_frozen_front_gets_its_gradient(make, check, arithmetic):
    weight = torch.randn(WIDTH, requires_grad=True)
    layers = [AdditiveCoupling(Reading(weight), i, 1 - i).requires_grad_(False) for i in range(2)]
    layers += [make.coupling("additive", WIDTH, i) for i in range(4)]
    program = ReversibleSequential(*layers, arithmetic=arithmetic)._program({}, None)
    x = make.streams(BATCH, WIDTH, requires_grad=False)
    found = []
    for stored in ((True,) * 6, (False, False, True, True, True, True), (False, False, True, False, False, True)):
        outputs, _ = run_partly_stored(program, x, stateless(program.core), stored)
        found.append(torch.autograd.grad(check.loss(outputs), weight)[0])
    assert found[0].abs().sum() > 0
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-5, atol=1e-6)


class Looking(nn.Module):
    """Adds what a stream of integers looks up."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, WIDTH)
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x, i):
        return self.linear(x + self.table(i)).chunk(2, dim=1)


@pytest.mark.composes("Structure", "a stream of integers in exact arithmetic, with a memory budget", "works")
@pytest.mark.parametrize("budget", ["free", 4 * STREAM, LOTS])
def test_integers_are_read_in_exact_arithmetic(make, check, budget):
    model = ReversibleSequential(*(GatedCoupling(Looking(), (i % 2, 2), 1 - i % 2) for i in range(4)))
    x = (*make.streams(BATCH, WIDTH), torch.randint(0, 9, (BATCH,)))
    assert "4 of 4" in str(plan(model, x))
    a, b, i = model(*x)
    assert torch.equal(i, x[2])
    leaves = [*model.parameters(), *x[:2]]
    expected = torch.autograd.grad(check.loss((a, b)), leaves)
    model.memory_budget = budget
    for one, other in zip(torch.autograd.grad(check.loss(model(*x)[:2]), leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
