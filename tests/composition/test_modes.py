"""Precisions. Train and eval mode, statistics and autocast on float32 streams are in tests/revgrad/test_replay.py."""

import copy

import pytest
import torch
from torch import nn

from revgrad import AdditiveCoupling, ReversibleSequential, Split

pytestmark = pytest.mark.usefixtures("single_thread")


def relative_error(found, expected):
    """Of a list of tensors, as one vector."""
    squares = sum((a.double() - b).square().sum() for a, b in zip(found, expected, strict=True))
    return float((squares / sum(b.square().sum() for b in expected)).sqrt())


@pytest.mark.composes("Modes", "autocast to bfloat16, streams in bfloat16 from a convolution")
def test_autocast_with_streams_from_a_convolution():
    def block():
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 1))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            couplings = [AdditiveCoupling(block(), i % 2, 1 - i % 2) for i in range(6)]
            self.chain = ReversibleSequential(Split(2), *couplings)

        def forward(self, x):
            return self.chain(self.stem(x))

    model, x = Model(), torch.randn(2, 3, 8, 8)

    def gradients(mode, model=model, x=x, enabled=True):
        model.chain.mode = mode
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = model(x)
            assert y[0].dtype == (torch.bfloat16 if enabled else x.dtype)
        loss = y[0].double().square().mean() + y[1].double().sin().mean()
        return torch.autograd.grad(loss, tuple(model.parameters()))

    oracle = gradients("stored", copy.deepcopy(model).double(), x.double(), enabled=False)
    stored, found = (relative_error(gradients(mode), oracle) for mode in ("stored", "reversible"))
    assert 1e-4 < stored < 0.1
    assert found < 1.2 * stored


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.composes(
    "Modes", "bfloat16 weights and streams, 16 layers", "works; gradient error < 1.2 x that of stored"
)
def test_pure_bfloat16_loses_little(seed):
    def block(width=32):
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    torch.manual_seed(seed)
    chain = ReversibleSequential(*(AdditiveCoupling(block(), i % 2, 1 - i % 2) for i in range(16))).bfloat16()
    x = tuple(torch.randn(64, 32).bfloat16() for _ in range(2))

    def gradients(mode, dtype):
        model = copy.deepcopy(chain).to(dtype)
        model.mode = mode
        inputs = tuple(t.to(dtype).requires_grad_() for t in x)
        loss = sum(y.double().square().mean() for y in model(*inputs))
        return torch.autograd.grad(loss, (*inputs, *model.parameters()))

    oracle = gradients("stored", torch.float64)
    stored, found = (relative_error(gradients(mode, torch.bfloat16), oracle) for mode in ("stored", "reversible"))
    assert 1e-3 < stored < 0.1
    assert found < 1.2 * stored
