"""A second evaluation that returns something else than the first one is noticed, however small the message is."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from revgrad import AdditiveCoupling, ChainState, ReversibilityError, ReversibleSequential, StreamError
from revgrad.message import NOTED, compare_with, note_of


class Scaled(nn.Module):
    """A message a thousandth of the stream's size, times what a function says."""

    def __init__(self, factor):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.factor = factor
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return 1e-3 * self.factor(self) * self.inner(x)


def streams():
    torch.manual_seed(0)
    return [torch.randn(3, 4, requires_grad=True) for _ in range(2)]


OTHERS = {
    "Python's random numbers": lambda m: 1 + (random.random() < 0.5),
    "NumPy's": lambda m: 1 + np.random.rand(),  # noqa: NPY002
    "a generator of its own": lambda m: 1 + torch.rand((), generator=m.generator),
}


def test_integers_alone_are_compared_as_well():
    chain = ReversibleSequential(AdditiveCoupling(nn.Identity(), 1, 0), AdditiveCoupling(nn.Linear(4, 4), 0, 2))
    a, b = streams()
    ones = torch.arange(12).reshape(3, 4)
    found = []
    for chain.mode in ("stored", "reversible"):
        loss = chain(a, ones, b)[2].square().sum()
        found.append(torch.autograd.grad(loss, (a, b, *chain.parameters())))
    torch.testing.assert_close(*found)


@pytest.mark.composes(
    "Randomness", "random numbers of Python, NumPy or a generator of one's own", "error: *another message*"
)
@pytest.mark.parametrize("factor", OTHERS.values(), ids=OTHERS)
def test_other_random_numbers_are_noticed(factor):
    random.seed(1)  # the first two numbers are on both sides of a half
    np.random.seed(0)  # noqa: NPY002
    chain = ReversibleSequential(AdditiveCoupling(Scaled(factor)))
    loss = chain(*streams())[1].sum()
    with pytest.raises(ReversibilityError, match=r"layer 0 \(AdditiveCoupling\): in the backward pass .* another"):
        loss.backward()
    assert all(p.grad is None for p in chain.parameters())


def test_pytorchs_random_numbers_are_repeated():
    found = []
    for mode in ("stored", "reversible"):
        x = streams()
        chain = ReversibleSequential(AdditiveCoupling(Scaled(lambda m: 1 + torch.rand(()))), mode=mode)
        chain(*x)[1].sum().backward()
        found.append(chain.layers[0].transform.inner.weight.grad)
    assert torch.equal(*found)


def test_an_attribute_that_changes_before_the_backward_pass_is_noticed():
    chain = ReversibleSequential(AdditiveCoupling(Scaled(lambda m: m.schedule)))
    chain.layers[0].transform.schedule = 1.0
    loss = chain(*streams())[1].sum()
    chain.layers[0].transform.schedule = 3.0
    with pytest.raises(ReversibilityError, match="off by 4 of its size"):
        loss.backward()


def test_a_state_changed_in_place_is_refused():
    class Moving(nn.Module):
        def forward(self, x, state):
            with torch.no_grad():
                state[0].mul_(0.9)
            return x * state[0], state

    chain = ReversibleSequential(AdditiveCoupling(Moving(), stateful=True))
    with pytest.raises(StreamError, match="changed its state in place"):
        chain(*streams(), states=ChainState(((torch.ones(3, 4),),)))


def test_the_first_messages_are_noted_and_then_none():
    chain = ReversibleSequential(*(AdditiveCoupling(nn.Tanh(), i % 2, 1 - i % 2) for i in range(2)))
    for n in range(1, NOTED + 2):
        chain(*streams())[1].sum().backward()
        assert [layer._noted for layer in chain] == [min(n, NOTED)] * 2
    with torch.no_grad():
        fresh = ReversibleSequential(AdditiveCoupling(nn.Tanh()))
        fresh(*streams())
    assert fresh.layers[0]._noted == 0  # nothing will be evaluated again


def test_nothing_is_noted_where_there_are_no_values():
    with FakeTensorMode():
        assert note_of((torch.ones(3),), (torch.ones(3),)) is None
    assert note_of((torch.ones(3, device="meta"),), ()) is None
    assert len(note_of((torch.ones(3),), (torch.ones(3),))) == 6


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 5e-4), (torch.float32, 5e-2), (torch.bfloat16, 0.5)])
def test_rounding_passes(dtype, allowed):
    torch.manual_seed(0)
    message = torch.randn(1000, dtype=dtype)
    note = note_of((message,), (message,))
    compare_with(note, (message * (1 + allowed / 2),), (message,), "it")
    with pytest.raises(ReversibilityError, match=r"^it: in the backward pass"):
        compare_with(note, (message * 5,), (message,), "it")
    compare_with(note, (message * 5,), (message * 2,), "it")  # the source is another one
    compare_with(note_of((message * float("nan"),), (message,)), (message,), (message,), "it")  # as in stored mode
