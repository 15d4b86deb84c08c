"""A loss made of what a transform computes in passing would have no gradient: whatever holds it, that raises."""

import gc
from collections import deque

import pytest
import torch
from torch import nn

from revgrad import AdditiveCoupling, ReversibilityError, ReversibleSequential, wrap
from revgrad.gradients import Closed
from revgrad.leftovers import Leftovers

KEPT = []


class Keeping(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.keep = keep

    def forward(self, x):
        y = self.inner(x)
        self.keep(y.square().mean())
        return y


class Collector:
    def __call__(self, loss):
        self.loss = loss


def hooked():
    module = nn.Linear(4, 4)
    module.register_forward_hook(lambda module, inputs, y: KEPT.append(y.square().mean()))
    return module


HOLDERS = {
    "a global": lambda: Keeping(KEPT.append),
    "an object": lambda: Keeping(Collector()),
    "a deque": lambda: Keeping(deque(maxlen=1).append),
    "a hook": hooked,
}


@pytest.fixture(autouse=True)
def _empty():
    yield
    KEPT.clear()


def streams():
    return [torch.ones(3, 4, requires_grad=True) for _ in range(2)]


@pytest.mark.composes(
    "Misuse", "a loss that a transform or a hook keeps in a list, an object or a global", "error: *still refers*"
)
@pytest.mark.parametrize("make", HOLDERS.values(), ids=HOLDERS)
def test_whatever_holds_it(make):
    chain = ReversibleSequential(AdditiveCoupling(make()))
    loss = chain(*streams())[1].sum()
    with pytest.raises(ReversibilityError, match="something still refers to a tensor that its transform has computed"):
        loss.backward()
    assert all(p.grad is None for p in chain.parameters())


def test_of_a_wrapped_function_too():
    def double(x, y):
        KEPT.append(2 * x)
        return 2 * x, y

    chain = ReversibleSequential(wrap(double, lambda x, y: (x / 2, y)))
    with pytest.raises(ReversibilityError, match="something still refers"):
        chain(*streams())[0].sum().backward()


def test_what_is_detached_may_stay():
    chain = ReversibleSequential(AdditiveCoupling(Keeping(lambda loss: KEPT.append(loss.detach()))))
    chain(*streams())[1].sum().backward()
    assert len(KEPT) == 2


def test_a_reference_cycle_is_nobodys_loss():
    def tie(loss):
        knot = [loss]
        knot.append(knot)

    chain = ReversibleSequential(AdditiveCoupling(Keeping(tie)))
    gc.disable()
    try:
        chain(*streams())[1].sum().backward()
    finally:
        gc.enable()


def test_only_a_graph_that_leads_to_the_sources_counts():
    x = torch.ones(3, requires_grad=True)
    y = (2 * x).sum()
    leftovers = Leftovers([x, torch.ones(3)], (), Closed({}, 0), 0)
    with pytest.raises(ReversibilityError, match=r"^it: something"):
        leftovers.check("it", nn.Identity())
    del y
    leftovers.check("it", nn.Identity())
