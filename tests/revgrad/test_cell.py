import gc

import pytest
import torch
from torch import nn

from revgrad import (
    AdditiveCoupling,
    ChainState,
    GatedCoupling,
    Inverse,
    LayerCall,
    LiveMemory,
    Residue,
    ReversibleSequential,
    check_invertible,
    snap,
    unroll,
    update_cell,
)
from revgrad.arithmetic import is_exact
from revgrad.cell import CellRecall
from revgrad.fingerprint import fingerprint
from revgrad.links import chain_links

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
        self.messages, self.count = messages, [0]

    def forward(self, x, state, *, update=update_cell):
        self.count[0] += 1
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
    call = LayerCall(state=(hidden, cell), residue=Residue())
    with torch.no_grad():
        out = layer.run((x, y), call)
        back = LayerCall(state=(hidden,), cell=call.new_state[1], residue=call.residue)
        assert torch.equal(layer.undo(out, back)[1], y)
    assert torch.equal(back.cell, cell)


def test_the_checker_looks_at_cells_too(make):
    model = Model(make, carries=1)
    report = check_invertible(model.core, [x.detach() for x in model.inputs[0]], model.state)
    assert report.exact
    assert report.invertible
    # A gate of the stream and one of the cell per module.
    assert report.bits > 3
    recover = CellRecall.recover
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CellRecall, "recover", lambda self: recover(self) + 1)
        report = check_invertible(model.core, [x.detach() for x in model.inputs[0]], model.state)
    assert not report.invertible


# Evaluations and memory


@pytest.mark.parametrize("every", [1, 2])
def test_one_evaluation_on_the_way_back(make, check, every):
    model = Model(make, FED["both"])
    outputs, _ = model.unroll(keep_states_every=every)
    steps = len(FED["both"])
    assert [layer.transform.count[0] for layer in model.core] == [steps] * 3
    check.loss(outputs).backward()
    assert [layer.transform.count[0] for layer in model.core] == [(2 if every == 1 else 3) * steps] * 3


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
