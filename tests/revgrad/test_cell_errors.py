"""What is said of cells that do not come back, and of transforms that do not keep to the update."""

import math

import pytest
import torch
from torch import nn

from revgrad import (
    AdditiveCoupling,
    ChainState,
    GatedCoupling,
    Inverse,
    ReversibilityError,
    ReversibleSequential,
    StreamError,
    unroll,
    update_cell,
)
from revgrad.cell import CellRecall
from tests.revgrad.test_cell import FED, LSTM, Model

pytestmark = pytest.mark.usefixtures("single_thread")


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
            self.count[0] += 1
            with torch.no_grad():
                self.gates.bias.data += self.count[0]
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
    recover = CellRecall.recover
    monkeypatch.setattr(CellRecall, "recover", lambda self: recover(self) + 2.0**-16)
    with pytest.raises(ReversibilityError, match=r"residue|recovered in the backward pass differs"):
        check.loss(outputs).backward()


def test_an_increment_that_differs_by_one_grid_step(make, check, monkeypatch):
    """The residue fits then, and one step does not read the cell it recovers: it has to be compared."""
    model = Model(make, (True,), depth=1)
    outputs, _ = unroll(model.core, model.inputs, model.state)
    recover = CellRecall.recover
    monkeypatch.setattr(CellRecall, "recover", lambda self: recover(self) + 2.0**-16)
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
