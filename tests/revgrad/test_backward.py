"""Drift of float inverses: bounded by anchors, caught by the guard."""

import copy
import gc

import pytest
import torch
from torch import nn

from revgrad import (
    AdditiveCoupling,
    AffineCoupling,
    GatedCoupling,
    Inverse,
    LiveMemory,
    ReversibilityError,
    ReversibleSequential,
    StreamError,
    Swap,
    unroll,
    wrap,
)

pytestmark = pytest.mark.usefixtures("single_thread", "warm")

BATCH, WIDTH = 64, 4
STREAM = BATCH * WIDTH * 4


class Strong(nn.Module):
    """Gates that keep about an eighth of the target: each float inverse loses a digit."""

    def __init__(self, width, logit=2.0):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)
        self.logit = logit

    def forward(self, x):
        a, h = self.linear(x).chunk(2, dim=1)
        return self.logit + a, torch.tanh(h)


class Wrong(AdditiveCoupling):
    """An inverse that is off by a tenth."""

    def unmerge(self, merged, *message):
        return merged - 1.1 * message[0]


def ill_conditioned(depth=16, **options):
    layers = [GatedCoupling(Strong(WIDTH), i % 2, 1 - i % 2) for i in range(depth)]
    return ReversibleSequential(*layers, arithmetic="float", **options)


def error_of(found, oracle):
    """Largest relative error over all gradients."""
    names = [name for name in found if name.startswith("gradient")]
    return max(float((found[n].double() - oracle[n]).norm() / oracle[n].norm()) for n in names)


def oracle_of(model, x, check):
    double = copy.deepcopy(model).double()
    return check.gradients(double, tuple(t.detach().double().requires_grad_() for t in x), "stored")


# Anchors


def test_anchors_save_a_chain_that_is_refused_without_them(make, check):
    model, x = ill_conditioned(), make.streams(BATCH, WIDTH)
    with pytest.raises(ReversibilityError, match="the input recovered in the backward pass differs"):
        check.gradients(model, x)
    oracle = oracle_of(model, x, check)
    errors = {}
    for every in (6, 4, 2):
        model.anchor_every = every
        errors[every] = error_of(check.gradients(model, x), oracle)
    assert errors[6] > 4 * errors[4] > 4 * errors[2]
    assert errors[2] < 3 * error_of(check.gradients(model, x, "stored"), oracle)


@pytest.mark.parametrize("kind", ["additive", "gated", "mixed"])
@pytest.mark.parametrize("every", [1, 2, 3, 99])
def test_anchors_do_not_change_exact_gradients(make, check, kind, every):
    model, x = make.chain(kind, 7, arithmetic="exact", anchor_every=every), make.streams()
    check.same(check.gradients(model, x), check.gradients(model, x, "stored"))


def test_anchors_over_time(make, check):
    core, x = make.recurrent("affine", 3), make.streams()
    state = make.state(core)
    found = {}
    for options in ({"mode": "stored"}, {"anchor_every": 1}, {"anchor_every": 1, "keep_states_every": 2}):
        outputs, _ = unroll(core, [x, None, x, None], state, arithmetic="float", **options)
        grads = torch.autograd.grad(check.loss(outputs), [*x, *core.parameters()])
        found[str(options)] = dict(enumerate([*outputs, *grads]))
    expected, *others = found.values()
    for other in others:
        check.same(other, expected, rtol=1e-5)


def test_anchors_take_their_own_memory_and_are_freed_when_used(make):
    depth, x = 8, make.streams(BATCH, WIDTH)
    held, peak = {}, {}
    gc.collect()
    for every in (None, 4, 2):
        model = make.chain("additive", depth, WIDTH, anchor_every=every).requires_grad_(False)
        with LiveMemory() as memory:
            y = model(*x)
            held[every] = memory.live
            loss = sum(t.sum() for t in y)
            del y
            loss.backward()
            peak[every] = memory.peak
            del loss
    # In front of layer 4: two streams. In front of 2, 4 and 6 two each, all of them distinct; those in front of the
    # first layer are the caller's, those behind the last one are the outputs.
    assert held[4] - held[None] == 2 * STREAM
    assert held[2] - held[None] == 3 * 2 * STREAM
    # When the first layer is rewound, its input is all that is left of them.
    assert peak[2] - peak[None] <= 3 * 2 * STREAM


def test_an_anchor_that_is_the_callers_tensor_must_not_change(make):
    x, y = make.streams(requires_grad=False)
    y = y.clone()
    model = ReversibleSequential(*(make.coupling("additive", 4, 0) for _ in range(3)), anchor_every=1)
    out = model(x, y)
    x.add_(1)  # no layer updates it, so it is kept in front of every layer
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(t.sum() for t in out).backward()


def test_what_is_recovered_is_compared_with_the_anchors_too(make, check):
    """They would hide from the check of the chain's input what went wrong behind them."""
    layers = [make.coupling("additive", 4, i) for i in range(6)]
    layers[4] = Wrong(layers[4].transform, 0, 1)
    model = ReversibleSequential(*layers, anchor_every=2)
    with pytest.raises(ReversibilityError, match="the input recovered in the backward pass differs"):
        check.loss(model(*make.streams())).backward()


def test_gradients_twice_from_one_graph(make, check):
    model, x = ill_conditioned(6, anchor_every=2), make.streams()
    loss = check.loss(model(*x))
    first = torch.autograd.grad(loss, x, retain_graph=True)
    check.same(dict(enumerate(torch.autograd.grad(loss, x))), dict(enumerate(first)))


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_nonsense_is_refused(make, every):
    with pytest.raises(StreamError, match="anchor_every must be at least 1"):
        make.chain("additive", 2, anchor_every=every)


@pytest.mark.parametrize("guard", [-1, 1.5, "always"])
def test_a_guard_of_nonsense_is_refused(make, guard):
    with pytest.raises(StreamError, match="drift_guard must be True, False or a number of forward passes"):
        make.chain("additive", 2, drift_guard=guard)


# What the error advises


class Bounded(nn.Module):
    """A first message of any size."""

    def __init__(self, logit):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit))

    def forward(self, x):
        return self.logit.expand_as(x), x


@pytest.mark.parametrize("guard", [False, True])
def test_an_output_that_is_not_finite_is_told_from_a_bad_inverse(make, check, guard):
    layers = [make.coupling("additive"), AffineCoupling(Bounded(1e3), 1, 0)]
    model = ReversibleSequential(*layers, drift_guard=guard)
    y = model(*make.streams())
    assert not y[0].isfinite().all()
    name = r"of layer 1 \(AffineCoupling\) " if guard else ""
    message = rf"the input {name}recovered .* and is not finite, .*: the output of the chain is not finite .*bound= of"
    with pytest.raises(ReversibilityError, match=message) as error:
        check.loss(y).backward()
    assert "exact" not in str(error.value)


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("kind", ["additive", "gated", "affine", "wrapped"])
def test_exact_arithmetic_is_advised_where_there_is_such_a_thing(make, check, kind, guard):
    wrong = make.coupling("additive" if kind == "wrapped" else kind)
    unmerge = wrong.unmerge
    wrong.unmerge = lambda merged, *message: unmerge(merged, *message) + 0.5
    more = [wrap(lambda *x: x, lambda *x: x)] if kind == "wrapped" else [Swap(), Inverse(Swap())]
    model = ReversibleSequential(*more, wrong, arithmetic="float", drift_guard=guard)
    with pytest.raises(ReversibilityError, match="mode='stored' avoids it") as error:
        check.loss(model(*make.streams())).backward()
    assert "not finite" not in str(error.value)
    assert ("arithmetic='exact'" in str(error.value)) == (kind in ("additive", "gated"))
    with pytest.raises(ReversibilityError, match="mode='stored' avoids it") as error:
        check.loss(model.bfloat16()(*make.streams(dtype=torch.bfloat16))).backward()
    assert "exact" not in str(error.value)


# Drift guard


@pytest.mark.parametrize("bad", range(5))
def test_the_guard_names_the_layer(make, check, bad):
    layers = [make.coupling("additive", 4, i) for i in range(5)]
    layers[bad] = Wrong(layers[bad].transform, bad % 2, 1 - bad % 2)
    model = ReversibleSequential(*layers, drift_guard=True)
    with pytest.raises(ReversibilityError, match=rf"the input of layer {bad} \(Wrong\) recovered in the backward pass"):
        check.loss(model(*make.streams())).backward()


def test_the_guard_is_exact_in_exact_arithmetic(make, check):
    class Restless(nn.Module):
        """Returns something else by one grid step the second time."""

        def __init__(self):
            super().__init__()
            self.count = [0]

        def forward(self, x):
            self.count[0] += 1
            return torch.tanh(x) + self.count[0] * 2.0**-16

    layers = [make.coupling("additive", 4, i) for i in range(4)]
    layers[2] = AdditiveCoupling(Restless(), 0, 1)
    model = ReversibleSequential(*layers, arithmetic="exact", drift_guard=True)
    with pytest.raises(ReversibilityError, match=r"the input of layer 2 \(AdditiveCoupling\) recovered"):
        check.loss(model(*make.streams())).backward()


def test_the_guard_names_the_layer_at_a_later_time_step(make, check):
    core = ReversibleSequential(*(make.coupling("additive", 4, i) for i in range(3)))
    core.layers[1] = Wrong(core[1].transform, 1, 0)
    entry = make.chain("additive", 2)
    outputs, _ = unroll(core, [make.streams(), None], entry=entry, exit=Inverse(entry), drift_guard=True)
    with pytest.raises(ReversibilityError, match=r"the input of layer 1 \(Wrong\)"):
        check.loss(outputs).backward()


def test_the_guard_sees_what_the_chains_input_does_not_tell(make, check):
    """A stream that is off in the middle and right again in the end."""

    class Doubling(AdditiveCoupling):
        def unmerge(self, merged, *message):
            return merged - 2 * message[0]

    class Halting(AdditiveCoupling):
        def unmerge(self, merged, *message):
            return merged

    net = make.net(4)
    layers = [Halting(net, 0, 1), Doubling(net, 0, 1)]
    x = make.streams()
    model = ReversibleSequential(*layers)
    check.loss(model(*x)).backward()  # the two errors cancel
    model.drift_guard = True
    with pytest.raises(ReversibilityError, match=r"the input of layer 1 \(Doubling\)"):
        check.loss(model(*x)).backward()


def test_the_guard_watches_so_many_first_passes(make, check):
    model, x = make.chain("additive", 4, drift_guard=2), make.streams()
    held = []
    for _ in range(4):
        with torch.no_grad():
            model(*x)  # does not count
        with LiveMemory() as memory:
            y = model(*x)
            held.append(memory.live - sum(t.numel() * 4 for t in y))
            del y
    per_stream = 3 * 8
    assert held == [4 * 2 * per_stream] * 2 + [2 * per_stream] * 2


@pytest.mark.parametrize("kind", ["additive", "gated", "mixed"])
@pytest.mark.parametrize("options", [{}, {"anchor_every": 2}])
def test_the_guard_leaves_good_chains_alone(make, check, kind, options):
    model, x = make.chain(kind, 6, drift_guard=True, **options), make.streams()
    check.same(check.gradients(model, x), check.gradients(model, x, "stored"), rtol=1e-5)


def test_an_empty_core_is_still_checked(make, check):
    bad = ReversibleSequential(Wrong(make.net(4), 0, 1))
    outputs, _ = unroll([], [make.streams()], exit=bad, drift_guard=True)
    with pytest.raises(ReversibilityError, match="the input recovered in the backward pass differs"):
        check.loss(outputs).backward()
