import copy

import pytest
import torch
from torch import nn

from revgrad import (
    ChainState,
    DeferredChecks,
    GatedCoupling,
    Residue,
    ResidueOverflow,
    ReversibilityError,
    ReversibleSequential,
    unroll,
    update_cell,
)
from revgrad.cell import CellRecall
from revgrad.checks import current_checks
from tests.revgrad.test_threads import in_another_thread

pytestmark = pytest.mark.usefixtures("single_thread")


class LSTM(nn.Module):
    """A cell that is inverted."""

    def __init__(self, width=4):
        super().__init__()
        self.gates = nn.Linear(2 * width, 4 * width)

    def forward(self, x, state, *, update=update_cell):
        hidden, cell = state
        i, f, g, o = self.gates(torch.cat([x, hidden], 1)).chunk(4, 1)
        cell = update(cell, f, torch.sigmoid(i) * torch.tanh(g))
        return (o, torch.sigmoid(o) * torch.tanh(x)), (torch.sigmoid(o) * torch.tanh(x), cell)


class Drifting(nn.Module):
    """Another message at every evaluation."""

    def __init__(self, transform, by):
        super().__init__()
        self.transform, self.by, self.count = transform, by, [0]

    def forward(self, x):
        self.count[0] += 1
        h, a = self.transform(x)
        return h, a + self.by * self.count[0]


def measured(step, **options):
    checks = DeferredChecks(**options)
    with checks.measuring():
        step()
    return checks


def recurrent_step(make, check, **options):
    """A function that trains a fresh copy of a recurrent chain, and returns all gradients and outputs."""
    chain = make.recurrent("gated", 3, states=2, carries=1)
    x = [make.streams(5), None, make.streams(5), None, make.streams(5)]
    state = make.state(chain, 5)

    def step(mode="reversible"):
        model = copy.deepcopy(chain)
        y, final = unroll(model, x, state, mode=mode, **(options if mode == "reversible" else {}))
        check.loss((*y, *final.tensors())).backward()
        found = {f"output {i}": t.detach() for i, t in enumerate((*y, *final.tensors()))}
        found |= {name: p.grad for name, p in model.named_parameters()}
        for i, streams in enumerate(x):
            for j, t in enumerate(streams or ()):
                found[f"input {i}, {j}"], t.grad = t.grad, None
        return found

    return step


# The same results


@pytest.mark.parametrize(
    "options",
    [{}, {"keep_states_every": 2}, {"drift_guard": True}, {"anchor_every": 2}, {"arithmetic": "float"}],
    ids=str,
)
def test_bits_are_those_of_checks_at_once(make, check, options):
    step = recurrent_step(make, check, **options)
    expected = step()
    checks = measured(step)
    with checks:
        found = step()
    assert bool(checks.passed())
    checks.raise_if_failed()
    check.same(found, expected)
    if "arithmetic" not in options:
        check.same(found, step("stored"))
        assert set(checks.capacities) == {5 * 4}


@pytest.mark.parametrize("mode", ["stored", "checkpoint"])
def test_other_modes_defer_theirs(make, check, mode):
    step = recurrent_step(make, check)
    expected = step(mode)
    checks = measured(lambda: step(mode))
    with checks:
        check.same(step(mode), expected)
    assert len(checks._pending) >= 1
    checks.raise_if_failed()


def test_cells_that_are_inverted(make, check):
    chain = ReversibleSequential(GatedCoupling(LSTM(), stateful=True, inverted_cell=1))
    zero = torch.zeros(3, 4)
    x = [make.streams(), None, None]

    def step():
        chain.zero_grad()
        check.loss(unroll(chain, x, ChainState(((zero, zero),)))[0]).backward()
        return {name: p.grad for name, p in chain.named_parameters()}

    expected = step()
    checks = measured(step)
    with checks:
        check.same(step(), expected)
    checks.raise_if_failed()


def test_a_backward_pass_later_and_twice(make, check):
    """It has the checks of its forward pass, wherever it runs; the residue is there for both."""
    chain, x = make.chain("gated", 6), make.streams()
    inputs = (*x, *chain.parameters())
    expected = torch.autograd.grad(check.loss(chain(*x)), inputs)
    checks = measured(lambda: chain(*x))
    with checks:
        loss = check.loss(chain(*x))
    before = len(checks._pending)
    for _ in range(2):
        found = torch.autograd.grad(loss, inputs, retain_graph=True)
        assert all(map(torch.equal, found, expected))
    assert len(checks._pending) > before
    checks.raise_if_failed()


def test_a_memory_budget(make, check):
    chain, x = make.chain("gated", 6, memory_budget="300 B"), make.streams()
    inputs = (*x, *chain.parameters())
    expected = torch.autograd.grad(check.loss(chain(*x)), inputs)
    checks = measured(lambda: check.loss(chain(*x)).backward())
    with checks:
        found = torch.autograd.grad(check.loss(chain(*x)), inputs)
    checks.raise_if_failed()
    assert all(map(torch.equal, found, expected))


class Seeing(nn.Module):
    """Notes the checks at every evaluation."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(current_checks())
        return x


class Around(nn.Module):
    """A transform with a chain in it."""

    def __init__(self, chain):
        super().__init__()
        self.chain, self.last = chain, nn.Linear(4, 8)

    def forward(self, x):
        return self.last(torch.cat(self.chain(*x.chunk(2, 1)), 1)).chunk(2, 1)


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
def test_what_is_run_again_has_them_in_any_thread(make, check, mode):
    """On a GPU autograd has a thread of its own."""
    seeing = Seeing()
    inside = make.chain("gated", 2, width=2, inner=lambda: seeing)
    chain, x = ReversibleSequential(GatedCoupling(Around(inside)), mode=mode), make.streams()
    inputs = (*x, *chain.parameters())
    expected = torch.autograd.grad(check.loss(chain(*x)), inputs)
    checks = measured(lambda: torch.autograd.grad(check.loss(chain(*x)), inputs))
    with checks:
        seeing.seen.clear()
        loss = check.loss(chain(*x))
        found = in_another_thread(lambda: torch.autograd.grad(loss, inputs))
    assert all(map(torch.equal, found, expected))
    assert len(seeing.seen) > 4
    assert set(seeing.seen) == {checks}
    checks.raise_if_failed()


# What is wrong is told


def test_gates_that_close_further_than_was_measured(make):
    chain, x = make.chain("gated", 8), make.streams(64)
    checks = measured(lambda: chain(*x), margin=1)
    with checks:
        chain(*x)
    checks.raise_if_failed()
    checks.forget()
    with torch.no_grad():
        for layer in chain:
            layer.transform.last.bias += 4.0
    with checks:
        chain(*x)[0].sum().backward()  # in its backward pass the words that are lost are missed
    assert not bool(checks.passed())
    with pytest.raises(ResidueOverflow, match=r"spilled \d+ words, but there is room for \d+, .* Measure again"):
        checks.raise_if_failed()
    checks.forget()
    with checks.measuring():
        chain(*x)
    with checks:
        chain(*x)[0].sum().backward()
    checks.raise_if_failed()


def test_a_margin_of_two_holds_gates_that_forget_twice_as_much():
    """Whatever the reservoirs hold when measured: here nothing has been spilled yet."""
    x, numerator = torch.ones(100), torch.full((100,), 2**15)
    checks = DeferredChecks()
    with checks.measuring():
        residue = Residue()
        for _ in range(15):
            residue.scale(x, numerator)
        residue.check_range()
        assert residue._word_bits() == 0
    with checks:
        residue = Residue()
        for _ in range(15):
            residue.scale(x, numerator // 2)
        residue.check_range()
        assert residue._word_bits() > 0
    checks.raise_if_failed()


def run_deferred(chain, x, check, before=lambda: None):
    checks = measured(lambda: chain(*x))
    with checks:
        loss = check.loss(chain(*x))
    before()
    loss.backward()
    assert not bool(checks.passed())
    with pytest.raises(ReversibilityError) as deferred:
        checks.raise_if_failed()
    return deferred.value


@pytest.mark.usefixtures("unnoted")  # where checks are deferred no message is looked at
@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_a_transform_that_is_not_deterministic(make, check, arithmetic, guarded):
    def chain():
        torch.manual_seed(0)
        made = make.chain("gated", 4, arithmetic=arithmetic, drift_guard=guarded)
        made[1].transform = Drifting(made[1].transform, 0.3)
        made(*make.streams())  # as often as measuring does
        return made

    def at_once():
        made, x = chain(), make.streams()
        with pytest.raises(ReversibilityError) as raised:
            check.loss(made(*x)).backward()
        return str(raised.value)

    assert str(run_deferred(chain(), make.streams(), check)) == at_once()


def test_weights_that_changed_before_the_backward_pass(make, check):
    chain = make.chain("gated", 4)

    def change():
        chain[2].transform.last.weight.data.add_(0.1)  # autograd does not notice

    assert "residue" in str(run_deferred(chain, make.streams(20), check, change))


def test_what_is_left_in_the_residue(make, check):
    """Nothing is lost of a zero, whatever the gate: only levels tell."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.count = [0]

        def forward(self, x):
            self.count[0] += 1
            return 0.01 * x - 0.1 * self.count[0], torch.zeros_like(x)

    chain = ReversibleSequential(GatedCoupling(Gate()))
    x = make.streams()[0], torch.zeros(3, 4)
    assert "the residue is not used up after the backward pass" in str(run_deferred(chain, x, check))


def test_a_cell_that_is_recovered_wrong(make, check, monkeypatch):
    chain = ReversibleSequential(GatedCoupling(LSTM(), stateful=True, inverted_cell=1))
    zero, x = torch.zeros(3, 4), [make.streams()]
    recover = CellRecall.recover
    monkeypatch.setattr(CellRecall, "recover", lambda self: recover(self) + 2.0**-16)
    checks = DeferredChecks(capacities={12: 1000})
    with checks:
        check.loss(unroll(chain, x, ChainState(((zero, zero),)))[0]).backward()
    with pytest.raises(ReversibilityError, match=r"layer 0 \(GatedCoupling\): the cell recovered .* differs"):
        checks.raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stream_that_leaves_the_grid(make, dtype):
    chain, x = make.chain("gated", 4).to(dtype), make.streams(dtype=dtype)
    checks = measured(lambda: chain(*x))
    large = tuple(1e6 * t.detach() for t in x)
    with pytest.raises(ReversibilityError) as at_once:
        chain(*large)
    with checks:
        chain(*large)
    with pytest.raises(ReversibilityError) as deferred:
        checks.raise_if_failed()
    assert str(deferred.value) == str(at_once.value)
    assert str(deferred.value).startswith("the input: the stream reached")


def test_the_largest_value_of_float64_stays_on_the_grid(make):
    chain, x = make.chain("additive", 1, arithmetic="exact").double(), torch.zeros(1, 4, dtype=torch.float64)
    x[0, 0] = 2**14 - 2.0**-32
    checks = measured(lambda: None)
    with checks:
        chain(x.requires_grad_(), torch.zeros_like(x))
    checks.raise_if_failed()


def test_an_initial_cell_off_the_grid(make):
    chain = ReversibleSequential(GatedCoupling(LSTM(), stateful=True, inverted_cell=1))
    zero = torch.zeros(3, 4)
    checks = DeferredChecks(capacities={12: 1000})
    with checks:
        unroll(chain, [make.streams()], ChainState(((zero, zero + 1e6),)))
    with pytest.raises(ReversibilityError, match="initial cell: the stream reached"):
        checks.raise_if_failed()


def test_the_first_error_is_the_one_that_is_raised_and_stays_until_it_is_forgotten():
    checks = DeferredChecks(capacities={})
    for i, ok in enumerate((True, False, False)):
        checks.require(torch.tensor(ok), lambda i=i: ReversibilityError(f"number {i}"))
    for _ in range(2):  # as after each replay of a graph
        with pytest.raises(ReversibilityError, match="number 1"):
            checks.raise_if_failed()
    checks.forget()
    checks.raise_if_failed()
    assert bool(checks.passed())


def test_what_the_host_knows_raises_at_once():
    with pytest.raises(ReversibilityError, match="known"):
        DeferredChecks(capacities={}).require(False, lambda: ReversibilityError("known"))


def test_where_nothing_was_collected_the_answer_is_on_the_device_that_is_asked_for():
    assert DeferredChecks().passed().device.type == "cpu"
    assert DeferredChecks().passed("meta").device.type == "meta"
