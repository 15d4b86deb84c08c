"""An interrupt or a lack of memory at any point of a step leaves modules as they were."""

import gc
import inspect
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import revgrad
from revgrad import AdditiveCoupling, GatedCoupling, ReversibleSequential
from revgrad.graphless import _NoFastPath
from revgrad.mending import Mending
from revgrad.message import NOTED
from revgrad.threads import _USES

pytestmark = pytest.mark.usefixtures("single_thread")


def transform(width):
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, width))


@pytest.fixture
def chain():
    torch.manual_seed(0)
    return ReversibleSequential(AdditiveCoupling(transform(2)), GatedCoupling(Two(), 1, 0)).double()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = transform(4)

    def forward(self, x):
        return self.inner(x).chunk(2, dim=1)


def step(chain, before_backward=lambda: None):
    torch.manual_seed(1)
    x = torch.randn(3, 4, dtype=torch.float64).chunk(2, dim=1)
    loss = sum(y.square().sum() for y in chain(*x))
    before_backward()
    loss.backward()
    grads = [p.grad for p in chain.parameters()]
    chain.zero_grad()
    return grads


class At(TorchDispatchMode):
    """Raises at the n-th operation."""

    def __init__(self, n, error):
        super().__init__()
        self.left, self.error = n, error

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return function(*args, **(kwargs or {}))


class InterruptAt:
    """Ctrl-C at the n-th line of the engine. Not in generators, whose end may come where nothing can be raised, nor
    where a lock is held: a line ends before `with` lets go of it, and Python looks for Ctrl-C only after that.
    """

    locked = _NoFastPath.__enter__.__code__, _NoFastPath.__exit__.__code__

    def __init__(self, n):
        self.left = n
        self.folder = revgrad.__path__[0]

    def __call__(self, frame, event, argument):
        code = frame.f_code
        ours = code.co_filename.startswith(self.folder) and code not in self.locked
        if not ours or code.co_flags & inspect.CO_GENERATOR:
            return None
        self.left -= 1
        if self.left == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)


def contents(chain):
    """All that an evaluation could have left in modules."""
    places = [(type(m), m.training, list(m._parameters.values()), list(m._buffers.values())) for m in chain.modules()]
    return [(*kinds, [id(x) for x in parameters], [id(x) for x in buffers]) for *kinds, parameters, buffers in places]


@pytest.mark.composes("Systems", "Ctrl-C or a lack of memory amid a step", "works: modules are as before, and go on")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["Ctrl-C", "no memory"])
def test_an_error_in_any_operation_leaves_modules_as_they_were(error, chain):
    def switch():
        chain.train(not chain.training)  # and the second evaluation back

    def failing(at):
        chain.train()
        with at:
            step(chain, switch)

    expected = [step(chain.train(), switch) for _ in range(NOTED + 1)][-1]
    counting = At(-1, error)
    failing(counting)
    before = contents(chain.train())
    for n in range(1, -1 - counting.left, 5):
        with pytest.raises(type(error)):
            failing(At(n, error))
        chain.zero_grad()
        assert contents(chain.train()) == before, n
    assert_goes_on(chain, expected)


def test_ctrl_c_anywhere_in_the_engine_leaves_modules_as_they_were(chain):
    expected = [step(chain) for _ in range(NOTED + 1)][-1]
    before = contents(chain)
    counting = InterruptAt(-1)
    with counting:
        step(chain)
    for n in range(1, -1 - counting.left, 19):
        with pytest.raises(KeyboardInterrupt), InterruptAt(n):
            step(chain)
        chain.zero_grad()
        assert contents(chain) == before, n
        assert parametrize._cache_enabled == 0
    assert_goes_on(chain, expected)


def assert_goes_on(chain, expected):
    torch.testing.assert_close(step(chain), expected)
    gc.collect()
    assert not [entered for entered in _USES if entered() is not None]
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_autocast_cache_enabled()


class Entered:
    def __init__(self, thread):
        self.thread, self.undone = thread, 0

    def undo(self):
        self.undone += 1


@pytest.mark.parametrize(("shift", "times"), [(0, 1), (1, 0)], ids=["this thread", "another"])
def test_only_what_this_thread_has_entered_is_undone(shift, times):
    mending = Mending()
    mending.entered = entered = Entered(threading.get_ident() + shift)
    with mending:
        pass
    assert entered.undone == 0
    with pytest.raises(KeyError), mending:
        raise KeyError
    assert entered.undone == times
