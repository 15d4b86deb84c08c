"""Arguments of transforms besides streams and states."""

import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from revgrad import (
    AdditiveCoupling,
    AffineCoupling,
    ChainState,
    GatedCoupling,
    Inverse,
    LiveMemory,
    ReversibleLayer,
    ReversibleSequential,
    StreamError,
    unroll,
)

pytestmark = pytest.mark.usefixtures("single_thread")

MODES = ["checkpoint", "reversible"]


class Conditioned(nn.Module):
    """A transform with every kind of argument."""

    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, context=None, *, scale=1.0, nested=None):
        y = torch.tanh(self.linear(x)) * scale
        if context is not None:
            y = y * context
        if nested is not None:
            y = y + nested["shifts"][0] * x if nested["how"] == "times x" else y + nested["shifts"][1]
        return y


class Unconditioned(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x, context):
        return torch.tanh(self.linear(x) * context.repeat(1, 2)).chunk(2, dim=1)


KINDS = {
    "additive": lambda *places: AdditiveCoupling(Conditioned(), *places),
    "affine": lambda *places: AffineCoupling(Two(), *places),
    "gated": lambda *places: GatedCoupling(Two(), *places),
    "inverse": lambda *places: Inverse(AdditiveCoupling(Conditioned(), *places)),
    "without": lambda *places: AdditiveCoupling(Unconditioned(), *places),
}


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gradients(model, x, leaves, call, loss, run=None):
    """In stored mode, and in the two others."""
    found = {}
    for mode in ("stored", *MODES):
        model.mode = mode
        y = (run or model)(*x, **call())
        found[mode] = dict(enumerate([*y, *torch.autograd.grad(loss(y), (*x, *leaves, *model.parameters()))]))
    return found


@pytest.fixture
def chain(small):
    return small.of(Conditioned, 5).double()


@pytest.fixture
def x(make):
    return make.streams(dtype=torch.float64)


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Conditioning", "a leaf with a gradient, as an argument of every transform")
def test_leaf(chain, x, check, mode, arithmetic):
    chain.arithmetic = arithmetic
    context = double(3, 4)
    found = gradients(chain, x, [context], lambda: {"context": context}, check.loss)
    check.same(found[mode], found["stored"], rtol=0 if arithmetic == "exact" else 1e-9)
    assert found["stored"][4].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Conditioning", "a computed tensor with a gradient (an embedding)")
def test_embedding(chain, x, check, mode):
    table, index = double(10, 4), torch.tensor([3, 1, 3])
    found = gradients(chain, x, [table], lambda: {"context": nn.functional.embedding(index, table)}, check.loss)
    check.same(found[mode], found["stored"], rtol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Conditioning", "optional, nested and plain arguments, by keyword")
def test_nested(chain, x, check, mode):
    a, b = double(4), double(1)
    for how in ("times x", "plus"):
        call = {"nested": {"how": how, "shifts": (a, [b, None][0])}, "scale": 0.5, "context": None}
        leaf = [a] if how == "times x" else [b]
        found = gradients(chain, x, leaf, lambda call=call: call, check.loss)
        check.same(found[mode], found["stored"], rtol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Conditioning", "arguments of single layers, instead of those of all")
def test_per_layer(chain, x, check, mode):
    everywhere, here = double(3, 4), double(3, 4)

    def call():
        return {"context": everywhere, "per_layer": [None, {"context": here}, {}, {"context": None, "scale": 2}, None]}

    found = gradients(chain, x, [everywhere, here], call, check.loss)
    check.same(found[mode], found["stored"], rtol=1e-9)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(st.sampled_from(sorted(KINDS)), max_size=4), wanted=st.booleans(), mode=st.sampled_from(MODES))
def test_any_chain_in_which_some_layers_take_the_argument(check, kinds, wanted, mode):
    """With and without its gradient; it is also an input stream."""
    torch.manual_seed(0)
    layers = [KINDS[kind](i % 2, 1 - i % 2) for i, kind in enumerate((*kinds, "additive"))]
    model = ReversibleSequential(*layers, arithmetic="float").double()
    x = double(3, 4), double(3, 4)
    context = x[0] if wanted else x[0].detach()
    found = gradients(model, x, [], lambda: {"context": context}, check.loss)
    check.same(found[mode], found["stored"], rtol=1e-8)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.composes("Conditioning", "`unroll` over time, the same arguments at every step")
def test_unroll(chain, x, check, every):
    context, entry = double(3, 4), AdditiveCoupling(Conditioned()).double()
    found = {}
    for mode in ("stored", *MODES):
        y, _ = unroll(
            chain,
            [x, None, x],
            entry=entry,
            exit=Inverse(entry),
            mode=mode,
            keep_states_every=every,
            conditioning={"context": context},
        )
        wanted = (*x, context, *chain.parameters(), *entry.parameters())
        found[mode] = dict(enumerate([*y, *torch.autograd.grad(check.loss(y), wanted)]))
    for mode in MODES:
        check.same(found[mode], found["stored"], rtol=1e-9)


def test_entry_is_rewound_for_its_conditioning_alone(chain, make, check):
    context, entry = double(3, 4), AdditiveCoupling(Conditioned()).double().requires_grad_(False)
    x = make.streams(dtype=torch.float64, requires_grad=False)
    core = ReversibleSequential(AdditiveCoupling(Unconditioned())).double()
    found = []
    for mode in ("stored", "reversible"):
        y, _ = unroll(core, [x, x], entry=entry, mode=mode, conditioning={"context": context})
        found.append(torch.autograd.grad(check.loss(y), context)[0])
    torch.testing.assert_close(*found)


class Cell(nn.Module):
    """A recurrent transform that is told something besides its state."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, state, *, context):
        message, new = self.linear(torch.cat([x + context, *state], 1)).chunk(2, 1)
        return message, (torch.tanh(new),)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.composes("Conditioning", "a recurrent cell over several steps, weights tied, told something new at each")
def test_recurrent_cell(make, x, check, mode):
    model = ReversibleSequential(*(AdditiveCoupling(Cell(), i, 1 - i, stateful=True) for i in range(2))).double()
    contexts = [double(3, 4) for _ in range(3)]
    start = double(3, 4), double(3, 4)

    def run(*x):
        states = ChainState(tuple((s,) for s in start))
        for context in contexts:
            x, states = model(*x, states=states, context=context)
        return (*x, *states.tensors())

    found = gradients(model, x, [*contexts, *start], dict, check.loss, run)
    check.same(found[mode], found["stored"], rtol=1e-9)


class Told(ReversibleLayer):
    """A user's own layer, without a coupling."""

    def accepts(self, name):
        return name == "context"

    def run(self, streams, call):
        return tuple(x * call.arguments["context"].exp() for x in streams)

    def undo(self, streams, call):
        return tuple(x * (-call.arguments["context"]).exp() for x in streams)


@pytest.mark.composes("Conditioning", "a layer of one's own that is no coupling")
def test_own_layer(x, check):
    context = double(3, 1)
    model = ReversibleSequential(Told(), AdditiveCoupling(Conditioned()), Inverse(Told())).double()
    found = gradients(model, x, [context], lambda: {"context": context}, check.loss)
    check.same(found["reversible"], found["stored"], rtol=1e-9)


@pytest.mark.composes("Conditioning", "the inverse, told the same")
def test_inverse(chain, x):
    call = {"context": double(3, 4), "per_layer": [{"scale": 3.0}] + [None] * 4}
    for a, b in zip(chain.inverse(*chain(*x, **call), **call), x, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.composes("Conditioning", "kept as it is, without a copy, and freed by the backward pass")
def test_memory(small, make, check):
    chain, x, leaf = small.of(Conditioned, 8), make.streams(64), torch.randn(64, 4)
    with LiveMemory():
        chain(*x)  # what is made on first use stays
    gc.collect()
    gc.disable()
    try:
        held = []
        for call in ({}, {"context": leaf}):
            with LiveMemory() as memory:
                y = chain(*x, **call)
                held.append(memory.live)
                del y
        assert held[0] == held[1]
        with LiveMemory() as memory:
            context = leaf * 2
            y = chain(*x, context=context)
            assert memory.live == held[0] + context.nbytes
            del context
            y[0].sum().backward()
            gradients = sum(t.grad.nbytes for t in (*x, *chain.parameters()))
            assert memory.live == held[0] + gradients
    finally:
        gc.enable()


@pytest.mark.composes("Conditioning", "changed in place before backward", "error: *modified by an inplace operation*")
def test_modified_before_backward(chain, x, check):
    context = torch.ones(3, 4, dtype=torch.float64)
    loss = check.loss(chain(*x, context=context))
    context.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.composes(
    "Conditioning", "changed in place by a transform", "error: *a transform changed a conditioning tensor*"
)
def test_modified_by_a_transform(x):
    class Greedy(nn.Module):
        def forward(self, x, context):
            return x * context.add_(1)

    with pytest.raises(StreamError, match=r"changed a conditioning tensor of shape \(4,\) in place"):
        ReversibleSequential(AdditiveCoupling(Greedy()))(*x, context=torch.ones(4))


@pytest.mark.parametrize("mode", ["stored", *MODES])
@pytest.mark.composes("Conditioning", "an argument that no layer takes", "error: *no layer of the chain takes*")
def test_arguments_that_do_not_fit(chain, small, x, mode):
    chain.mode = mode
    with pytest.raises(StreamError, match="no layer of the chain takes an argument 'contxt'"):
        chain(*x, contxt=1)
    with pytest.raises(StreamError, match="no layer of the chain takes an argument 'x'"):
        chain(*x, x=1)  # the name of the source
    with pytest.raises(StreamError, match="the chain has 5 layers, but per_layer has 2 entries"):
        chain(*x, per_layer=[None, None])
    with pytest.raises(StreamError, match=r"layer 2 \(AdditiveCoupling\) takes no argument 'b', but per_layer has"):
        chain(*x, per_layer=[None, None, {"b": 1}, None, None])
    with pytest.raises(StreamError, match="no layer of the chain takes an argument 'context'"):
        small.of(Unconditioned)(*x, context=1)


def test_any_keyword_is_taken_by_a_transform_that_takes_all():
    class Open(nn.Module):
        def forward(self, x, state, **rest):
            return x * rest["factor"], state

    layer = AdditiveCoupling(Open(), stateful=True)
    assert layer.accepts("factor")
    assert not layer.accepts("x")
    assert not layer.accepts("state")
