"""Backward passes that are differentiated themselves, beside those of stored mode in float64."""

import gc

import pytest
import torch
from torch import nn

from revgrad import (
    AdditiveCoupling,
    ChainState,
    LiveMemory,
    Permute,
    ReversibilityError,
    ReversibleSequential,
    unroll,
    wrap,
)

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def x(make):
    return make.streams(dtype=torch.float64)


def penalty(model, x, loss, wanted=None, **call):
    """A gradient penalty, and its gradients with respect to inputs, weights and what else is wanted."""
    torch.manual_seed(3)
    value = loss(model(*x, **call))
    first = torch.autograd.grad(value, x, create_graph=True)
    total = value.sin() + sum(g.square().sum() for g in first)
    grads = torch.autograd.grad(total, (*x, *model.parameters(), *(wanted or ())))
    return dict(enumerate([*first, *grads]))


def in_both_modes(model, x, loss, *rest, **call):
    found = []
    for mode in ("reversible", "stored"):
        model.mode = mode
        found.append(penalty(model, x, loss, *rest, **call))
    return found


@pytest.mark.parametrize("kind", ["additive", "affine", "gated", "mixed"])
@pytest.mark.composes(
    "Autograd",
    "gradient penalties and other second derivatives (create_graph=True)",
    "works; twice the forward pass and the memory of stored mode",
)
def test_gradient_penalty(make, check, x, kind):
    model = make.chain(kind, 4, arithmetic="float").double()
    check.same(*in_both_modes(model, x, check.loss), rtol=1e-8)


def test_gradient_penalty_where_gradients_exist_already(make, check, x):
    model = make.chain("additive", 4).double()
    found = []
    for mode in ("reversible", "stored"):
        model.mode = mode
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        (first,) = torch.autograd.grad(check.loss(model(*x)), x[:1], create_graph=True)
        first.square().sum().backward()
        found.append(dict(enumerate(p.grad for p in model.parameters())))
    check.same(*found, rtol=1e-8)


def test_random_numbers_and_statistics_are_those_of_the_forward_pass(make, check):
    model = make.chain("additive", 4, inner=lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.3))).double()
    x = make.streams(6, dtype=torch.float64)
    before = [b.clone() for b in model.buffers()]
    statistics = []
    for mode in ("reversible", "stored"):
        model.mode = mode
        for b, old in zip(model.buffers(), before, strict=True):
            b.copy_(old)
        statistics.append(
            penalty(model, x, check.loss) | {"buffers": torch.cat([b.flatten() for b in model.buffers()])}
        )
    check.same(*statistics, rtol=1e-8)


def doubled(undone):
    """`2 a, b`, whose inverse gives `a` in another memory layout."""
    return wrap(lambda a, b: (2 * a, b), lambda a, b: (undone(a / 2), b))


@pytest.mark.parametrize(
    "layers",
    [
        lambda reads: (reads, Permute([1, 0, 3, 2], target=0)),  # undone, the stream has another layout
        lambda reads: (doubled(torch.Tensor.contiguous), reads),  # and here in the second run
    ],
    ids=["undone", "run again"],
)
def test_transforms_read_the_memory_layout_of_the_forward_pass(check, layers):
    """Dropout draws its mask in the order of memory."""
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Dropout(0.5))
    model = ReversibleSequential(*layers(AdditiveCoupling(net))).double()
    a, b = (torch.randn(2, 4, 3, 3, dtype=torch.float64) for _ in range(2))
    x = a.to(memory_format=torch.channels_last).requires_grad_(), b.requires_grad_()
    check.same(*in_both_modes(model, x, check.loss), rtol=1e-8)


def test_states_and_conditioning(check, x):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, state, context):
            message, new = torch.tanh(self.linear(torch.cat([x * context, *state], 1))).chunk(2, 1)
            return message, (new,)

    model = ReversibleSequential(
        *(AdditiveCoupling(Cell(), i % 2, 1 - i % 2, stateful=True) for i in range(3))
    ).double()
    context = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    start = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def loss(result):
        streams, state = result
        return check.loss(streams) + check.loss(tuple(state.tensors()))

    states = ChainState(((start,), (start * 2,), (start.sin(),)))
    call = {"states": states, "context": context.exp()}
    found = []
    for mode in ("reversible", "stored"):
        model.mode = mode
        value = loss(model(*x, **call))
        wanted = (*x, start, context, *model.parameters())
        first = torch.autograd.grad(value, wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, retain_graph=True)
        found.append(dict(enumerate([*first, *second])))
    check.same(*found, rtol=1e-8)


def test_state_that_is_handed_on(check, x):
    class Pass(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, state):
            return torch.tanh(self.linear(x) + state[0]), state

    model = ReversibleSequential(AdditiveCoupling(Pass(), stateful=True)).double()
    state = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    check.same(
        *in_both_modes(model, x, lambda r: check.loss((*r[0], *r[1].tensors())), states=ChainState(((state,),))),
        rtol=1e-8,
    )


def test_a_sparse_gradient(check, x):
    class Looked(nn.Module):
        """Of a word, from a table whose gradient is sparse."""

        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4)

        def forward(self, x, word):
            return torch.tanh(self.last(x) * self.table(word))

    model = ReversibleSequential(AdditiveCoupling(Looked()), AdditiveCoupling(Looked(), 1, 0)).double()
    one, other = in_both_modes(model, x, check.loss, word=torch.tensor([1, 1, 4]))
    check.same(*({k: v.to_dense() for k, v in found.items()} for found in (one, other)), rtol=1e-8)


def test_third_derivatives(make, check, x):
    model = make.chain("additive", 3).double()
    found = []
    for mode in ("reversible", "stored"):
        model.mode = mode
        value = check.loss(model(*x)).sin()
        for _ in range(3):
            grads = torch.autograd.grad(value, x, create_graph=True)
            value = sum(g.square().sum() for g in grads)
        found.append(dict(enumerate(grads)))
    check.same(*found, rtol=1e-6)


@pytest.mark.parametrize("mode", ["stored", "reversible"])
def test_empty_chain(x, check, mode):
    first = torch.autograd.grad(check.loss(ReversibleSequential(mode=mode)(*x)), x, create_graph=True)
    (second,) = torch.autograd.grad(first[1].sum(), x[1:])
    assert torch.equal(second, torch.full_like(second, 3))


def test_gradgradcheck(make, x):
    model = make.chain("mixed", 3, arithmetic="float").double()
    assert torch.autograd.gradgradcheck(model, x)


def test_inverse_that_is_wrong_is_seen(make, check, x):
    model = make.chain("additive", 2).double()
    value = check.loss(model(*x))
    model[0].transform.first.weight.data.add_(1)
    with pytest.raises(ReversibilityError, match="recovered in the backward pass differs"):
        torch.autograd.grad(value, x, create_graph=True)


def test_a_closed_over_tensor_is_seen(x):
    outside = torch.ones(4, dtype=torch.float64, requires_grad=True)

    class Closure(nn.Module):
        def forward(self, x):
            return torch.tanh(x) * outside

    value = ReversibleSequential(AdditiveCoupling(Closure()))(*x)[1].sum()
    with pytest.raises(ReversibilityError, match=r"the transform reads a tensor of shape \(4,\)"):
        torch.autograd.grad(value, x, create_graph=True)


@pytest.mark.composes(
    "Autograd", "second derivatives in exact arithmetic or of an unroll", "error: *second derivatives*"
)
def test_what_cannot_be_differentiated_twice_says_so(make, check, x):
    exact = make.chain("gated", 2).double()
    carried = make.recurrent("additive", 2, carries=1).double()
    core = make.chain("additive", 2).double()
    for value in (
        check.loss(exact(*x)),
        check.loss(carried(*x, states=make.state(carried, dtype=torch.float64))[0]),
        check.loss(unroll(core, [x, None])[0]),
        check.loss(unroll(core, [x])[0]),
    ):
        with pytest.raises(ReversibilityError, match=r"second derivatives .* choose mode='stored'"):
            torch.autograd.grad(value, x, create_graph=True)


def test_everything_is_freed(make, check):
    model, x = make.chain("additive", 4), make.streams(64)
    with LiveMemory():  # what is imported on first use leaves frames behind
        penalty(model, x, check.loss)
    gc.collect()
    gc.disable()
    try:
        with LiveMemory() as memory:
            found = {k: t.detach() for k, t in penalty(model, x, check.loss).items()}
            assert memory.live == sum(t.nbytes for t in found.values())
            del found
            assert memory.live == 0
    finally:
        gc.enable()
