"""The oracle of these tests: stored autograd in float64, with the same weights."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from revgrad import AdditiveCoupling, ReversibleSequential


class Plain(nn.Module):
    """A transform of `[B, W]` without a buffer or a counter."""

    def __init__(self, width=4):
        super().__init__()
        self.first, self.last = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def alternating(transform, depth=4, **options):
    """Additive couplings of two streams, in turn; the transforms are made by `transform()`."""
    return ReversibleSequential(*(AdditiveCoupling(transform(), i % 2, 1 - i % 2) for i in range(depth)), **options)


@pytest.fixture
def small():
    """A transform and a chain of such."""
    return SimpleNamespace(net=Plain, chain=lambda depth=4, **k: alternating(Plain, depth, **k), of=alternating)


@pytest.fixture
def as_stored(check):
    """Checks that outputs and all gradients are those of stored mode, in float64."""

    def compare(model, x, mode="reversible", rtol=1e-9, **call):
        model = model.double()
        x = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in x)
        expected = check.gradients(model, x, "stored", **call)
        check.same(check.gradients(model, x, mode, **call), expected, rtol=rtol)
        return expected

    return compare
