import gc
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from revgrad import (
    AdditiveCoupling,
    ChainState,
    GatedCoupling,
    Inverse,
    LiveMemory,
    Residue,
    ReversibilityError,
    ReversibleSequential,
    Step,
    StreamError,
    check_invertible,
    snap,
    unroll,
    update_cell,
)
from revgrad.cell import Merge, Recall
from revgrad.chain import fingerprint
from revgrad.layer import gradients
from revgrad.residue import entropy_bits
from revgrad.unroll import chain_links, is_exact

pytestmark = pytest.mark.usefixtures("single_thread")

WIDTH, BATCH = 4, 3
WAYS = {
    "checkpoint": {"mode": "checkpoint"},
    "reversible": {},
    "every second": {"keep_states_every": 2},
    "every third": {"keep_states_every": 3},
    "only the first": {"keep_states_every": 99},
}
FED = {
    "teacher forcing": (True,) * 5,
    "free running": (True, False, False, False, False),
    "both": (True, True, False, True, False, False, True),
    "one step": (True,),
}


class LSTM(nn.Module):
    """`[B, W]` and `(hidden, cell, *memory)`; the output gate looks at the new cell through a peephole."""

    def __init__(self, width=WIDTH, memories=0, messages=2):
        super().__init__()
        self.gates = nn.Linear((2 + memories) * width, (4 + 2 * memories) * width)
        self.peephole = nn.Parameter(torch.randn(width))
        self.messages, self.calls = messages, 0

    def forward(self, x, state, *, update=update_cell):
        self.calls += 1
        hidden, cell, *memory = state
        parts = self.gates(torch.cat([x, hidden, *memory], 1)).split(x.shape[1], 1)
        i, f, g, o = parts[:4]
        cell = update(cell, f, torch.sigmoid(i) * torch.tanh(g))
        memory = tuple(torch.sigmoid(parts[4]) * m + torch.tanh(parts[5]) for m in memory)
        hidden = torch.sigmoid(o + self.peephole * cell) * torch.tanh(sum(memory, cell))
        message = (2 * hidden - 1, hidden) if self.messages == 2 else hidden
        return message, (hidden, cell, *memory)


class Model:
    """A recurrent chain between an encoder and its inverse, with inputs and states that want gradients."""

    def __init__(self, make, fed=(True,), carries=0, depth=3, inverted=True, dtype=torch.float32):
        torch.manual_seed(0)
        self.entry = make.chain("additive", 2).to(dtype)
        self.core = ReversibleSequential(
            *(
                GatedCoupling(
                    LSTM(memories=carries),
                    source=i % 2,
                    target=1 - i % 2,
                    stateful=True,
                    carries=carries,
                    inverted_cell=1 if inverted else None,
                )
                for i in range(depth)
            )
        ).to(dtype)

        def new():
            return torch.randn(BATCH, WIDTH, dtype=dtype, requires_grad=True)

        self.inputs = [(new(), new()) if f else None for f in fed]
        self.state = ChainState(tuple((new(), new()) for _ in range(depth)), tuple(new() for _ in range(carries)))

    def unroll(self, **options):
        return unroll(self.core, self.inputs, self.state, entry=self.entry, exit=Inverse(self.entry), **options)

    def leaves(self):
        leaves = [x for streams in self.inputs if streams for x in streams]
        return [*leaves, *self.state.tensors(), *self.entry.parameters(), *self.core.parameters()]

    def run(self, check, **options):
        """Outputs and every gradient, by name."""
        outputs, state = self.unroll(**options)
        loss = check.loss(outputs) + check.loss(tuple(state.tensors()))
        grads = torch.autograd.grad(loss, self.leaves())
        return dict(enumerate([*outputs, *state.tensors(), *grads]))


# The update


def cell_tensors(shape, dtype=torch.float32, scale=4.0):
    """Cell, decay and increment."""
    cell, decay, increment = (torch.randn(shape, dtype=torch.float64).mul(scale).to(dtype) for _ in range(3))
    return snap(cell), decay, increment


def merged(residue, cell, decay, increment):
    update = Merge("layer", residue, cell)
    return update(update.stand_in, decay, increment)


def recovered(residue, new, decay, increment):
    update = Recall("layer", residue, new)
    assert torch.equal(update(update.stand_in, decay, increment), new)
    return update.recover()


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    steps=st.integers(1, 30),
    seed=st.integers(0, 2**16),
)
def test_recovered_bit_for_bit_over_many_steps(shape, dtype, scale, steps, seed):
    torch.manual_seed(seed)
    residue, cells, given_ = Residue(), [snap(torch.randn(shape, dtype=dtype))], []
    with torch.no_grad():
        for _ in range(steps):
            _, decay, increment = cell_tensors(shape, dtype, scale)
            increment = torch.tanh(increment)
            given_.append((decay, increment))
            cells.append(merged(residue, cells[-1], decay, increment))
        found = cells[-1]
        for before, inputs in zip(reversed(cells[:-1]), reversed(given_), strict=True):
            found = recovered(residue, found, *inputs)
            assert torch.equal(found, before)
    residue.check_undone_to()
    residue.check_range()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_off_the_float_update_by_rounding_alone(dtype):
    cell, decay, increment = cell_tensors((1000,), dtype)
    wanted = update_cell(cell.double(), decay.double(), increment.double())
    found = merged(Residue(), cell, decay, increment).double()
    # The gate is rounded to 2^-16, and never to zero; the increment and the product to the grid.
    step = 2.0**-16 if dtype == torch.float32 else 2.0**-32
    assert ((found - wanted).abs() <= 2.0**-16 * cell.abs() + 2 * step).all()


def test_bits_are_the_entropy_of_the_forget_gate():
    residue, bits, cell, steps = Residue(), 0.0, snap(torch.randn(500)), 40
    with torch.no_grad():
        for _ in range(steps):
            decay = torch.randn(500).mul_(2)
            bits += entropy_bits((torch.sigmoid(decay) * 2**16).round().clamp(1))
            cell = merged(residue, cell, decay, torch.randn(500))
    # Levels are counted in steps of 1/512 bit, rounded up.
    assert bits <= residue.used_bits <= bits + 500 * steps * 1.1 / 512


@pytest.mark.parametrize("decay", [-200.0, -12.0, 0.0, 12.0, 200.0])
def test_extreme_gates(decay):
    cell, decay, increment = snap(torch.randn(50)), torch.full((50,), decay), torch.randn(50)
    residue = Residue()
    with torch.no_grad():
        new = merged(residue, cell, decay, increment)
        torch.testing.assert_close(new, update_cell(cell, decay, increment), rtol=0, atol=2e-4)
        assert torch.equal(recovered(residue, new, decay, increment), cell)
    assert math.isclose(residue.used_bits, 0.0)


def test_gradient_passes_straight_through_the_rounding():
    leaves = [x.requires_grad_() for x in cell_tensors((200,), torch.float64, scale=1.0)]
    cell, decay, _ = leaves
    weight = torch.randn(200, dtype=torch.float64)
    found = torch.autograd.grad((merged(Residue(), *leaves) * weight).sum(), leaves)
    gate = torch.sigmoid(decay)
    rounded = (gate * 2**16).round() / 2**16
    torch.testing.assert_close(found[0], weight * rounded, rtol=0, atol=0)
    torch.testing.assert_close(found[1], weight * cell * gate * (1 - gate))
    assert torch.equal(found[2], weight)


def test_gradient_of_a_cell_that_is_recovered_is_that_of_one_that_is_stored():
    leaves = [x.requires_grad_() for x in cell_tensors((50,), scale=1.0)]
    weight, residue = torch.randn(50), Residue()
    new = merged(residue, *leaves)
    expected = torch.autograd.grad(new, leaves, weight)
    update = Recall("layer", residue, new.detach())
    out = update(update.stand_in, *leaves[1:])
    assert torch.equal(update.recover(), leaves[0])
    assert all(map(torch.equal, gradients((out,), (weight,), (update.stand_in, *leaves[1:])), expected))


# Equality


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fed", FED)
@pytest.mark.parametrize("carries", [0, 1])
def test_gradients_are_those_of_stored_autograd_bit_for_bit(make, check, fed, way, carries):
    model = Model(make, FED[fed], carries)
    check.same(model.run(check, **WAYS[way]), model.run(check, mode="stored"))


@pytest.mark.parametrize("fed", FED)
def test_close_to_kept_cells_in_float64(make, check, fed):
    """What the gates' rounding to 2^-16 changes, and the only thing that inverted cells change."""
    found = Model(make, FED[fed], 1, dtype=torch.float64).run(check)
    expected = Model(make, FED[fed], 1, inverted=False, dtype=torch.float64).run(check, mode="stored")
    check.same(found, expected, rtol=2e-3)
    floats = Model(make, FED[fed], 1, inverted=False, dtype=torch.float64).run(check, mode="stored", arithmetic="float")
    check.same(found, floats, rtol=2e-3)


@pytest.mark.parametrize("mode", ["stored", "checkpoint", "reversible"])
def test_float_arithmetic_keeps_the_cells(make, check, mode):
    found, expected = (
        Model(make, (True, True), 1, inverted=inverted).run(check, arithmetic="float", mode=mode)
        for inverted in (True, False)
    )
    check.same(found, expected)


def test_a_time_step_is_the_chain(make):
    model = Model(make, (True, True, True))
    outputs, final = unroll(model.core, model.inputs, model.state)
    state = model.state
    # Each call starts with an empty residue, and so may round the other way.
    for t, x in enumerate(model.inputs):
        y, state = model.core(*x, states=state)
        torch.testing.assert_close(outputs[0][t], y[0], rtol=0, atol=1e-3)
    for a, b in zip(final.tensors(), state.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_chain_called_by_hand(make, check):
    """`ReversibleSequential` over time, in all modes."""
    model = Model(make, (True, True, True), depth=2)
    found = []
    for mode in ("stored", "checkpoint", "reversible"):
        model.core.mode = mode
        state, total = model.state, 0.0
        for x in model.inputs:
            y, state = model.core(*x, states=state)
            total = total + check.loss(y)
        leaves = [*model.core.parameters(), *model.state.tensors()]
        found.append(torch.autograd.grad(total + check.loss(tuple(state.tensors())), leaves))
    assert all(map(torch.equal, found[1], found[0]))
    assert all(map(torch.equal, found[2], found[0]))


@pytest.mark.parametrize("options", [{"memory_budget": 2000}, {"memory_budget": "1 GB"}, {"anchor_every": 2}], ids=str)
def test_chains_that_store_layers_or_anchors(make, check, options):
    model, found = Model(make, depth=4), []
    for mode, more in (("stored", {}), ("reversible", {"drift_guard": True} | options)):
        core = ReversibleSequential(*model.core, mode=mode, **more)
        y, state = core(*model.inputs[0], states=model.state)
        loss = check.loss(y) + check.loss(tuple(state.tensors()))
        leaves = [*model.inputs[0], *model.state.tensors(), *core.parameters()]
        found.append([*y, *torch.autograd.grad(loss, leaves)])
    assert all(map(torch.equal, *found))


def test_anchors_in_time(make, check):
    model = Model(make, FED["both"])
    found = model.run(check, anchor_every=1, drift_guard=True)
    check.same(found, model.run(check, mode="stored"))


def test_additive_coupling(make, check):
    model = Model(make, FED["both"])
    model.core = ReversibleSequential(
        *(
            AdditiveCoupling(LSTM(messages=1), source=i % 2, target=1 - i % 2, stateful=True, inverted_cell=1)
            for i in range(3)
        )
    )
    assert is_exact("auto", chain_links(model.core))
    assert not is_exact("float", chain_links(model.core))
    check.same(model.run(check), model.run(check, mode="stored"))


def test_autocast(make, check):
    # One step, because stored autograd adds up over time in the dtype of autocast.
    model = Model(make, carries=1)
    found = []
    for mode in ("reversible", "stored"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs, state = unroll(model.core, model.inputs, model.state, mode=mode)
        loss = check.loss(outputs) + check.loss(tuple(state.tensors()))
        leaves = [*model.inputs[0], *model.state.tensors(), *model.core.parameters()]
        found.append(torch.autograd.grad(loss, leaves))
    assert all(map(torch.equal, *found))


def test_backward_twice_through_one_graph(make, check):
    for way in ("reversible", "every second"):
        model = Model(make, FED["both"])
        outputs, _ = model.unroll(**WAYS[way])
        first = torch.autograd.grad(check.loss(outputs), model.leaves(), retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(check.loss(outputs), model.leaves())))


def test_loss_on_one_output_or_state_alone(make):
    model = Model(make, FED["both"], carries=1)
    leaves = (*model.inputs[0], *model.state.tensors(), *model.core.parameters())
    for pick in (lambda y, s: y[0][-1].square().sum(), lambda y, s: s.layers[1][1].sum(), lambda y, s: y[1][2].sum()):
        found = []
        for options in ({"mode": "stored"}, {}, {"keep_states_every": 3}):
            loss = pick(*unroll(model.core, model.inputs, model.state, **options))
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            found.append([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)])
        assert all(map(torch.equal, found[0], found[1]))
        assert all(map(torch.equal, found[0], found[2]))


def test_cells_frozen_or_given_without_gradients(make, check):
    model = Model(make, FED["both"])
    model.core[1].requires_grad_(False)
    for x in model.state.tensors():
        x.requires_grad_(False)
    model.leaves = lambda: [*model.entry.parameters(), *model.core[0].parameters(), *model.core[2].parameters()]
    check.same(model.run(check), model.run(check, mode="stored"))


# The inverse


def test_inverse_takes_the_new_states(make):
    model = Model(make)
    x = tuple(map(snap, model.inputs[0]))
    residue = Residue()
    with torch.no_grad():
        y, new = model.core(*x, states=model.state, residue=residue)
        back = model.core.inverse(*y, states=model.state, new_states=new, residue=residue)
    assert all(map(torch.equal, back, x))
    residue.check_undone_to()


def test_layer_recovers_its_cell(make):
    layer, (x, y) = Model(make).core[0], (torch.randn(BATCH, WIDTH), snap(torch.randn(BATCH, WIDTH)))
    hidden, cell = torch.randn(BATCH, WIDTH), snap(torch.randn(BATCH, WIDTH))
    step = Step(state=(hidden, cell), residue=Residue())
    with torch.no_grad():
        out = layer.run((x, y), step)
        back = Step(state=(hidden,), cell=step.new_state[1], residue=step.residue)
        assert torch.equal(layer.undo(out, back)[1], y)
    assert torch.equal(back.cell, cell)


def test_the_checker_looks_at_cells_too(make):
    model = Model(make, carries=1)
    report = check_invertible(model.core, [x.detach() for x in model.inputs[0]], model.state)
    assert report.exact
    assert report.invertible
    # A gate of the stream and one of the cell per module.
    assert report.bits > 3
    recover = Recall.recover
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recall, "recover", lambda self: recover(self) + 1)
        report = check_invertible(model.core, [x.detach() for x in model.inputs[0]], model.state)
    assert not report.invertible


# Evaluations and memory


@pytest.mark.parametrize("every", [1, 2])
def test_one_evaluation_on_the_way_back(make, check, every):
    model = Model(make, FED["both"])
    outputs, _ = model.unroll(keep_states_every=every)
    steps = len(FED["both"])
    assert [layer.transform.calls for layer in model.core] == [steps] * 3
    check.loss(outputs).backward()
    assert [layer.transform.calls for layer in model.core] == [(2 if every == 1 else 3) * steps] * 3


@pytest.fixture
def no_collector():
    """What is freed must be freed by reference counts alone."""
    fingerprint((torch.zeros(1),), True)  # its weights are made once and stay
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("carries", [0, 1])
def test_an_unroll_holds_hidden_states_last_cells_and_the_residue(make, no_collector, carries):
    batch, steps, depth = 512, 6, 3
    stream = batch * WIDTH * 4
    model = Model(make, carries=carries, depth=depth)
    x = make.streams(batch, WIDTH)
    own = tuple((torch.randn(batch, WIDTH), snap(torch.randn(batch, WIDTH))) for _ in range(depth))
    state = ChainState(own, (torch.randn(batch, WIDTH),) * carries)
    inputs = [x] + [None] * (steps - 1)
    residue = Residue()
    with torch.no_grad():
        streams, now = tuple(map(snap, x)), state
        for _ in range(steps):
            streams, now = model.core(*streams, states=now, residue=residue)
    with LiveMemory() as memory:
        outputs, final = unroll(model.core, inputs, state)
        # The first hidden states and memory are the caller's; the first cells have been copied to the grid.
        kept = (steps - 1) * depth + carries * (steps * depth - 1) + 2 * depth
        expected = (2 * steps + kept) * stream + residue.bits // 8 + steps * 2 * 24
        assert memory.live == expected + (depth + carries) * stream
        del final
        assert memory.live == expected
        del outputs
        assert memory.live == 0


def test_backward_frees_everything(make, check, no_collector):
    model = Model(make, FED["both"], 1)
    for x in model.leaves():
        x.grad = torch.zeros_like(x)
    for options in WAYS.values():
        with LiveMemory() as memory:
            outputs, state = model.unroll(**options)
            loss = check.loss(outputs) + check.loss(tuple(state.tensors()))
            del outputs, state
            loss.backward()
            del loss
            assert memory.live == 0


# Errors


class Broken(LSTM):
    """An LSTM that does something it must not do with its cell."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x, state, *, update=update_cell):
        hidden, cell = state
        i, f, g, _ = self.gates(torch.cat([x, hidden], 1)).split(x.shape[1], 1)
        increment = torch.sigmoid(i) * torch.tanh(g)
        if self.how == "no update":
            new = update_cell(cell, f, increment)
        elif self.how == "twice":
            new = update(update(cell, f, increment), f, increment)
        elif self.how == "another":
            new = update(hidden, f, increment)
        elif self.how == "not returned":
            new = update(cell, f, increment) * 1
        elif self.how == "shape":
            new = update(cell, f[:, :1], increment)
        else:
            new = update(cell, f + (cell if self.how == "peephole" else 0), increment)
        if self.how == "random":
            self.calls += 1
            with torch.no_grad():
                self.gates.bias.data += self.calls
        hidden = torch.tanh(new)
        return (f, hidden), (hidden, new)


def broken(how):
    return ReversibleSequential(GatedCoupling(Broken(how), stateful=True, inverted_cell=1))


@pytest.mark.parametrize("mode", ["stored", "checkpoint", "reversible"])
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("no update", StreamError, r"layer 0 \(GatedCoupling\): the transform must call update"),
        ("not returned", StreamError, "the transform must call update.* and return what it returns"),
        ("twice", StreamError, "the transform calls update twice"),
        ("another", StreamError, "gives update something else than the cell"),
        ("shape", StreamError, r"of the cell's shape \(3, 4\), got \(3, 1\) and \(3, 4\)"),
        ("peephole", ReversibilityError, r"cell \(only update may read the old one\): the stream is not finite"),
    ],
)
def test_transforms_that_do_not_keep_to_the_update(make, mode, how, error, message):
    core, x = broken(how), make.streams()
    state = ChainState(((torch.randn(3, 4), torch.randn(3, 4)),))
    with pytest.raises(error, match=message):
        unroll(core, [x, None], state, mode=mode)


def test_gates_that_differ_on_recomputation(make, check):
    state = ChainState(((torch.randn(3, 4), torch.randn(3, 4)),))
    outputs, _ = unroll(broken("random"), [make.streams()] + [None] * 5, state)
    with pytest.raises(ReversibilityError, match=r"residue|recovered in the backward pass"):
        check.loss(outputs).backward()


@pytest.mark.parametrize("every", [1, 2])
def test_a_cell_that_is_not_the_one_given(make, check, every, monkeypatch):
    model = Model(make, FED["both"])
    outputs, _ = unroll(model.core, model.inputs, model.state, keep_states_every=every)
    recover = Recall.recover
    monkeypatch.setattr(Recall, "recover", lambda self: recover(self) + 2.0**-16)
    with pytest.raises(ReversibilityError, match=r"residue|recovered in the backward pass differs"):
        check.loss(outputs).backward()


def test_an_increment_that_differs_by_one_grid_step(make, check, monkeypatch):
    """The residue fits then, and one step does not read the cell it recovers: it has to be compared."""
    model = Model(make, (True,), depth=1)
    outputs, _ = unroll(model.core, model.inputs, model.state)
    recover = Recall.recover
    monkeypatch.setattr(Recall, "recover", lambda self: recover(self) + 2.0**-16)
    with pytest.raises(ReversibilityError, match=r"layer 0 \(GatedCoupling\): the cell recovered .* differs"):
        check.loss(outputs).backward()


def test_final_cells_modified_before_backward(make, check):
    model = Model(make, FED["both"])
    outputs, state = unroll(model.core, model.inputs, model.state)
    with torch.no_grad():
        state.layers[1][1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        check.loss(outputs).backward()


@pytest.mark.parametrize("value", [math.nan, math.inf, 256.0])
@pytest.mark.parametrize("mode", ["stored", "reversible"])
def test_an_initial_cell_off_the_range(make, mode, value):
    model = Model(make)
    with torch.no_grad():
        model.state.layers[1][1][0, 0] = value
    with pytest.raises(ReversibilityError, match=r"layer 1 \(GatedCoupling\), initial cell: the stream"):
        unroll(model.core, model.inputs, model.state, mode=mode)


@pytest.mark.parametrize("mode", ["stored", "checkpoint", "reversible"])
def test_a_cell_that_leaves_the_range(make, mode):
    class Growing(nn.Module):
        def forward(self, x, state, *, update=update_cell):
            hidden, cell = state
            cell = update(cell, torch.full_like(x, 50.0), torch.full_like(x, 50.0))
            return torch.tanh(cell) * x, (hidden, cell)

    core = ReversibleSequential(AdditiveCoupling(Growing(), stateful=True, inverted_cell=1))
    zero = torch.zeros(3, 4)
    x = [make.streams()] + [None] * 9
    unroll(core, x[:5], ChainState(((zero, zero),)), mode=mode)
    with pytest.raises(
        ReversibilityError, match=r"layer 0 \(AdditiveCoupling\), cell .*: the stream reached 1\.17 times"
    ):
        unroll(core, x, ChainState(((zero, zero),)), mode=mode)


def test_a_gate_that_is_not_a_number():
    cell, decay, increment = cell_tensors((4,))
    residue = Residue(keep=False)
    decay[2] = math.nan
    with torch.no_grad():
        assert merged(residue, cell, decay, increment).isnan().tolist() == [False, False, True, False]
    with pytest.raises(ReversibilityError, match="is not finite"):
        residue.check_range()


def test_wrong_couplings(make):
    for transform, options in (
        (LSTM(), {"stateful": False, "inverted_cell": 1}),
        (LSTM(), {"stateful": True, "inverted_cell": -1}),
        (make.cell(4), {"stateful": True, "inverted_cell": 0}),
    ):
        with pytest.raises(StreamError, match=r"needs stateful=True, and a transform .* update=revgrad.update_cell"):
            GatedCoupling(transform, **options)
    model = Model(make, carries=1)
    for layer in model.core:
        layer.inverted_cell = 2
    with pytest.raises(StreamError, match=r"layer 0 .*: inverted_cell=2, but the layer's own state has 2 tensor"):
        model.unroll()


def test_update_is_no_conditioning_argument(make):
    model = Model(make)
    assert not model.core.accepts("update")
    with pytest.raises(StreamError, match="no layer of the chain takes an argument 'update'"):
        model.core(*model.inputs[0], states=model.state, update=update_cell)


def test_inverse_without_the_new_states(make):
    model = Model(make)
    y, new = model.core(*model.inputs[0], states=model.state)
    with pytest.raises(StreamError, match=r"layer 2 .* only be recovered from the state after the step.* new_states="):
        model.core.inverse(*y, states=model.state)
    with pytest.raises(StreamError, match=r"undoing an inverted cell has no gradient: call it in torch.no_grad\(\)"):
        model.core.inverse(*y, states=model.state, new_states=new)
    with pytest.raises(StreamError, match=r"a coupling inside Inverse\(...\) is to be made without inverted_cell"):
        unroll([Inverse(model.core[0])], model.inputs, ChainState(model.state.layers[:1]), arithmetic="exact")
