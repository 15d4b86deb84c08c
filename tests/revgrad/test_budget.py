"""Memory budgets: what is stored, what that takes, and that nothing else changes."""

import copy
import gc
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from revgrad import AdditiveCoupling, LiveMemory, ReversibilityError, ReversibleSequential, StreamError, Swap, plan
from revgrad.budget import choose_stored, parse_budget, parse_bytes, run_cut
from revgrad.chain import stateless
from revgrad.cost import ChainCost, LayerCost, Stream, measure
from tests.revgrad.test_cost import CHAINS

pytestmark = pytest.mark.usefixtures("single_thread", "warm")

BATCH, WIDTH = 64, 4
STREAM = BATCH * WIDTH * 4
LOTS = "1 GiB"


# Sizes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, 0),
        (12345, 12345),
        ("7 B", 7),
        ("2KB", 2000),
        ("1.5 MB", 1_500_000),
        ("3 GB", 3 * 10**9),
        ("2 KiB", 2048),
        (" 0.5 MiB ", 2**19),
        ("2 gib", 2**31),
        ("1 TiB", 2**40),
    ],
)
def test_sizes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize(
    "size", [-1, 1.5, True, None, "", "2", "GiB", "2 GiB more", "two GiB", "-1 MB", "1e9 B", "2 XB"]
)
def test_nonsense_sizes(size):
    with pytest.raises(StreamError, match="memory_budget must be a number of bytes or a text such as"):
        parse_bytes(size)


def test_free_is_a_budget_but_no_number_of_bytes():
    assert parse_budget("free") == "free"
    assert parse_budget("2 KiB") == 2048
    with pytest.raises(StreamError, match="got 'free'"):
        parse_bytes("free")


def test_wrong_options(make):
    with pytest.raises(StreamError, match=r"got 'lots'.*; or 'free'"):
        make.chain("additive", 2, memory_budget="lots")
    for mode in ("stored", "checkpoint"):
        with pytest.raises(StreamError, match=f"it goes with mode='reversible', not '{mode}'"):
            make.chain("additive", 2, mode=mode, memory_budget=LOTS)


# What is stored


def uniform(depth, flops=lambda i: 100, saved=lambda i: 3000, stream=1000):
    """Layers that change two streams in turn, none of which is saved."""
    places = [[0, 1]]
    for i in range(depth):
        places.append([*places[-1]])
        places[-1][i % 2] = i + 2
    layers = tuple(LayerCost(f"{i}", flops(i), flops(i), {("graph", i): saved(i)}, {}) for i in range(depth))
    streams = tuple(tuple(Stream(n, 0 if n < 2 else stream, stream) for n in place) for place in places)
    return ChainCost(layers, streams, ({},) * (depth + 1), {}, exact=False)


def drawn(stored):
    return "".join("s" if s else "r" for s in stored)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(0, "rrrrr"), (2900, "rrrrr"), (20000, "sssss"), (10**9, "sssss")],
)
def test_none_and_all(budget, expected):
    assert drawn(choose_stored(uniform(5), budget)) == expected


def test_of_equal_layers_neighbours_are_stored():
    """Every place where stored and reversed layers meet costs the streams there."""
    for budget in (6100, 9100, 12100):
        assert drawn(choose_stored(uniform(8), budget)).count("sr") <= 1


def test_the_layer_that_saves_most_per_byte_comes_first():
    assert drawn(choose_stored(uniform(5, flops=lambda i: 10**6 if i == 2 else 100), 6000)) == "rrsrr"
    assert (
        drawn(choose_stored(uniform(5, flops=lambda i: 10**6, saved=lambda i: 100 if i == 2 else 6000), 4000))
        == "rrsrr"
    )


def test_what_does_not_fit_makes_room_for_what_does():
    chosen = choose_stored(
        uniform(4, flops=lambda i: 10**6 if i == 3 else 10, saved=lambda i: 500 if i == 3 else 5), 60
    )
    assert not chosen[3]
    assert any(chosen)


@given(
    st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 5000)), min_size=1, max_size=8),
    st.integers(0, 30000),
    st.sampled_from([None, 1, 2, 3]),
)
def test_the_budget_is_kept(layers, budget, anchor_every):
    cost = uniform(len(layers), flops=lambda i: layers[i][0], saved=lambda i: layers[i][1])
    nothing = cost.kept([False] * len(layers), anchor_every)
    chosen = choose_stored(cost, budget, anchor_every)
    assert len(chosen) == len(layers)
    assert cost.kept(chosen, anchor_every) <= nothing + budget


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ([3, 3, 3, 3, 3], "rrrrs"),
        ([9, 3, 3, 3, 3], "rrsss"),
        ([3, 3, 7, 2, 2], "rrrss"),
        ([3, 3, 3, 3, 4], "rrrrr"),
        ([5], "r"),
    ],
)
def test_free_are_the_last_ones_that_save_no_more_than_one_in_front(saved, expected):
    cost = uniform(len(saved), saved=lambda i: 1000 * saved[i])
    assert drawn(choose_stored(cost, "free")) == expected


def test_within_a_budget_they_come_first_where_none_in_front_saves_more_per_byte():
    """The first one takes less, since the caller holds its input, but stays until the end."""
    assert drawn(choose_stored(uniform(5, saved=lambda i: 3000 + 1000 * (i > 0)), 6000)) == "srrrr"
    assert drawn(choose_stored(uniform(5), 6000)) == "rrrrs"


def test_long_chains_are_planned_in_time():
    assert sum(choose_stored(uniform(1000), 3000 * 500)) > 490


def test_bijections_go_with_their_neighbours(make):
    """A swap between two stored couplings would otherwise be a run of its own, which copies streams."""
    layers = [x for i in range(4) for x in (make.coupling("additive", WIDTH), Swap())]
    model = ReversibleSequential(*layers, memory_budget=5 * STREAM)
    model(*make.streams(BATCH, WIDTH))
    (stored,) = model._cuts.values()
    assert any(stored)
    assert not all(stored)
    assert stored[1] == stored[2]
    assert stored[3] == stored[4]
    assert stored[5] == stored[6] == stored[7]


# Running


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
            y, _ = run_cut(program, x, state, stored)
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
    assert len(model._cuts) == 1  # also where layers are made anew, as those of an inverse are
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
        before = [layer.transform.calls for layer in model]
        gc.collect()
        with LiveMemory() as memory:
            check.loss(model(*x)).backward()
        peak[budget] = memory.peak
        calls[budget] = [layer.transform.calls - n for layer, n in zip(model, before, strict=True)]
        gradients[budget] = {name: p.grad for name, p in model.named_parameters()}
    assert calls == {None: [2] * 6, "free": [2] * 5 + [1]}
    assert peak["free"] <= peak[None] + slack
    check.same(gradients["free"], gradients[None], rtol=0 if arithmetic == "exact" else 1e-4)


def test_stored_layers_are_evaluated_once(make, check):
    model, x = make.chain("additive", 6, WIDTH, memory_budget=8 * STREAM), make.streams(BATCH, WIDTH)
    check.loss(model(*x)).backward()
    (stored,) = model._cuts.values()
    assert 0 < sum(stored) < 6
    assert [layer.transform.calls for layer in model] == [1 if s else 2 for s in stored]


def test_measured_once_per_kind_of_input(make):
    model = make.chain("additive", 4, WIDTH, memory_budget=LOTS)
    for batch in (8, 8, 16, 8):
        model(*make.streams(batch, WIDTH))
    assert len(model._cuts) == 2
    model.eval()
    model(*make.streams(8, WIDTH))
    model[0].requires_grad_(False)
    model(*make.streams(8, WIDTH))
    with torch.no_grad():
        model(*make.streams(99, WIDTH))
    model.memory_budget = "1 KB"
    model(*make.streams(8, WIDTH))
    assert len(model._cuts) == 5


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
    assert drawn(*model._cuts.values()) == "ssrss"
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
