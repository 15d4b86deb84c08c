import copy
import threading

import pytest
import torch
from torch import nn

from revgrad import AdditiveCoupling, ReversibilityError, ReversibleSequential
from revgrad.threads import _USES, Use


class Calling(nn.Module):
    """Calls a function amid its evaluation, if that has a graph."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.amid = None

    def forward(self, x):
        if self.amid is not None and torch.is_grad_enabled():
            amid, self.amid = self.amid, None
            amid()
        return self.inner(x)


def in_another_thread(function):
    """What it returned or raised."""
    found = []

    def run():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def step(chain):
    y = chain(torch.ones(1, 4), torch.ones(1, 4))
    y[1].sum().backward()
    return y[1].detach()


@pytest.mark.composes("Systems", "another thread amid a backward pass", "error: *two threads*")
def test_a_pass_of_another_thread_amid_a_backward_pass_raises_there():
    chain = ReversibleSequential(AdditiveCoupling(Calling()))
    found = []
    module = chain.layers[0].transform
    module.amid = lambda: found.append(in_another_thread(lambda: step(chain)))
    step(chain)
    assert isinstance(found[0], ReversibilityError)
    assert "two threads use the same modules" in str(found[0])
    assert all(isinstance(p, nn.Parameter) and p.grad is not None for p in module.inner._parameters.values())
    assert _USES == []


@pytest.mark.parametrize("when", ["a copy", "afterwards"])
def test_a_copy_or_one_after_the_other_is_fine(when):
    chain = ReversibleSequential(AdditiveCoupling(Calling()))
    other = copy.deepcopy(chain) if when == "a copy" else chain
    found = []
    if when == "a copy":
        chain.layers[0].transform.amid = lambda: found.append(in_another_thread(lambda: step(other)))
    expected = step(chain)
    if not found:
        found.append(in_another_thread(lambda: step(other)))
    assert torch.equal(found[0], expected)


def test_shared_uses_meet_exclusive_ones_do_not():
    some, others = frozenset([nn.Tanh(), nn.ReLU()]), frozenset([nn.Tanh()])
    with Use(some, exclusive=False):
        assert in_another_thread(lambda: Use(some, exclusive=False).__enter__()) is None
        _USES.pop()
        with Use(some, exclusive=True):  # of the same thread
            assert in_another_thread(lambda: Use(others, exclusive=True).__enter__()) is None
            _USES.pop()
            assert isinstance(in_another_thread(lambda: Use(some, exclusive=False).__enter__()), ReversibilityError)
        assert isinstance(in_another_thread(lambda: Use(some, exclusive=True).__enter__()), ReversibilityError)
    assert _USES == []
