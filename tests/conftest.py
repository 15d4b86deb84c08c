"""What all tests share: a fixed seed, one thread where bits are compared, and tiny transforms and chains."""

import copy
import gc
import os
from types import SimpleNamespace

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch is imported: workers, and what they start, share the cores
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined
from hypothesis import settings
from torch import nn

from revgrad import AdditiveCoupling, AffineCoupling, ChainState, GatedCoupling, ReversibleSequential
from revgrad.fingerprint import fingerprint

settings.register_profile("repository", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repository")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """What `-n auto` means: a worker takes about a gigabyte, too much for one on each core of a large machine."""
    return min(8, os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def single_thread():
    """Sums in one order: results can be compared bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unnoted(monkeypatch):
    """No message is compared with the one of the forward pass, as after the first passes."""
    monkeypatch.setattr("revgrad.coupling.NOTED", 0)


class Net(nn.Module):
    """`[B, W]` to one message or several; counts its evaluations."""

    def __init__(self, width, messages=1, *, inner=None, out=None):
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.inner = nn.Identity() if inner is None else inner
        self.last = nn.Linear(2 * width, messages * (out or width))
        self.messages = messages
        self.count = [0]

    def forward(self, x):
        self.count[0] += 1
        y = self.last(self.inner(torch.tanh(self.first(x))))
        return y if self.messages == 1 else y.chunk(self.messages, dim=1)


class Cell(nn.Module):
    """A recurrent `Net`: `[B, W]` and a state of such tensors, to the message and the new state."""

    def __init__(self, width, messages=2, states=1):
        super().__init__()
        self.mix = nn.Linear(width * (1 + states), width * (messages + states))
        self.messages, self.states = messages, states
        self.count = [0]

    def forward(self, x, state):
        self.count[0] += 1
        parts = self.mix(torch.cat([x, *state], dim=1)).chunk(self.messages + self.states, dim=1)
        message = parts[: self.messages]
        return message[0] if self.messages == 1 else message, tuple(map(torch.tanh, parts[self.messages :]))


COUPLINGS = {"additive": (AdditiveCoupling, 1), "affine": (AffineCoupling, 2), "gated": (GatedCoupling, 2)}


def coupling(kind, width=4, i=0, **options):
    """The i-th coupling of a chain that alternates between two streams."""
    cls, messages = COUPLINGS[kind]
    return cls(Net(width, messages, **options), source=i % 2, target=1 - i % 2)


def chain(kind="additive", depth=4, width=4, inner=None, **options):
    """A chain of one kind of coupling; `mixed` alternates additive and gated ones."""
    kinds = {"mixed": ("additive", "gated")}.get(kind, (kind,))
    layers = [coupling(kinds[i // 2 % len(kinds)], width, i, inner=inner() if inner else None) for i in range(depth)]
    return ReversibleSequential(*layers, **options)


def recurrent(kind="gated", depth=2, width=4, states=1, carries=0, **options):
    """A chain of stateful couplings; with `carries`, the last tensors of the state go from layer to layer."""
    cls, messages = COUPLINGS[kind]
    layers = [
        cls(
            Cell(width, messages, states + carries),
            source=i % 2,
            target=1 - i % 2,
            stateful=True,
            carries=carries,
        )
        for i in range(depth)
    ]
    return ReversibleSequential(*layers, **options)


def state_for(model, batch=3, width=4, dtype=torch.float32, requires_grad=False):
    """A random state for a chain made by `recurrent`."""

    def new():
        return torch.randn(batch, width, dtype=dtype).mul_(0.5).requires_grad_(requires_grad)

    carries = model[0].carries
    own = model[0].transform.states - carries
    return ChainState(tuple(tuple(new() for _ in range(own)) for _ in model), tuple(new() for _ in range(carries)))


def streams(batch=3, width=4, count=2, dtype=torch.float32, requires_grad=True):
    return tuple(torch.randn(batch, width, dtype=dtype).requires_grad_(requires_grad) for _ in range(count))


def loss_of(outputs):
    """A loss with another gradient for every element."""
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    total = 0
    for i, y in enumerate(outputs):
        weight = torch.linspace(-1, 1 + i, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
        total = total + (weight * y).sum() + (0.5 + i) * y.square().sum()
    return total


def gradients_of(model, inputs, mode=None, seed=3, **call):
    """Outputs and all gradients, by name, of a fresh copy of the model: nothing leaks from one mode to the next."""
    model = copy.deepcopy(model)
    if mode is not None:
        model.mode = mode
    inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    torch.manual_seed(seed)
    outputs = model(*inputs, **call)
    loss_of(outputs).backward()
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs if isinstance(outputs, tuple) else (outputs,))}
    found |= {f"gradient of input {i}": x.grad for i, x in enumerate(inputs)}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    found |= {f"buffer {name}": b for name, b in model.named_buffers()}
    return found


def assert_same(found, expected, rtol=0.0, atol=0.0):
    """Equal names, and equal tensors: bit for bit, or relative to the largest value of each."""
    assert found.keys() == expected.keys()
    for name, a in found.items():
        b = expected[name]
        assert (a is None) == (b is None), f"{name}: one is None"
        if a is None:
            continue
        a, b = a.detach(), b.detach()
        if rtol == atol == 0:
            assert torch.equal(a, b), f"{name}: off by {float((a - b).abs().max()):.3g}"
        else:
            error = float((a.double() - b.double()).abs().max())
            assert error <= atol + rtol * float(b.abs().max()), f"{name}: off by {error:.3g}"


@pytest.fixture
def warm():
    """What is made once and stays is there: bytes can be counted."""
    for precise in (True, False):
        fingerprint((torch.zeros(1),), precise)
    gc.collect()


@pytest.fixture
def make():
    """Builders of tiny transforms, chains, states and streams."""
    return SimpleNamespace(
        net=Net, cell=Cell, coupling=coupling, chain=chain, recurrent=recurrent, state=state_for, streams=streams
    )


@pytest.fixture
def check():
    """Comparison of modes."""
    return SimpleNamespace(loss=loss_of, gradients=gradients_of, same=assert_same)
