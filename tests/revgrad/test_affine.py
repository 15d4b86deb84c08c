import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from revgrad import AffineCoupling, Inverse, LayerCall, ReversibleSequential, StreamError


class Fixed(nn.Module):
    def __init__(self, *message):
        super().__init__()
        self.message = message

    def forward(self, x):
        return self.message


def test_bounded_scale_is_its_formula():
    x, s, t = (torch.randn(3, 4, dtype=torch.float64) * 3 for _ in range(3))
    merged = AffineCoupling(Fixed(s, t), bound=1.5).run((x, x), LayerCall())[1]
    torch.testing.assert_close(merged, x * torch.exp(1.5 * torch.tanh(s / 1.5)) + t)


def test_bound_is_never_left_and_hardly_felt_near_zero():
    x, zero = torch.ones(3), torch.zeros(3)
    for bound in (0.5, 2.0):
        far = AffineCoupling(Fixed(torch.tensor([1e9, -1e9, math.inf]), zero), bound=bound).run((x, x), LayerCall())[1]
        torch.testing.assert_close(far.log(), torch.tensor([bound, -bound, bound]))
        near = AffineCoupling(Fixed(torch.full((3,), 1e-3), zero), bound=bound).run((x, x), LayerCall())[1]
        torch.testing.assert_close(near.log(), torch.full((3,), 1e-3), rtol=1e-4, atol=1e-7)


@given(seed=st.integers(0, 10_000), bound=st.floats(0.1, 4), size=st.floats(-3, 3))
def test_the_promised_error_of_the_inverse_holds(seed, bound, size):
    torch.manual_seed(seed)
    x, s, t = torch.randn(3, 500) * 10**size
    layer = AffineCoupling(Fixed(s, t), bound=bound)
    merged = layer.run((x, x), LayerCall())[1]
    unit = torch.finfo(torch.float32).eps / 2
    error = (layer.undo((x, merged), LayerCall())[1].double() - x.double()).abs()
    assert (error <= 8 * unit * math.exp(bound) * (merged.abs() + t.abs()).double()).all()


@pytest.mark.parametrize("wrap", [lambda layer: layer, Inverse])
def test_gradients_are_those_of_autograd(make, check, wrap):
    layers = [AffineCoupling(make.net(3, 2), i % 2, 1 - i % 2, bound=1.0) for i in range(4)]
    chain = ReversibleSequential(*map(wrap, layers)).double()
    x = make.streams(width=3, dtype=torch.float64)
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"), rtol=1e-12)
    assert torch.autograd.gradcheck(chain, x)


@pytest.mark.parametrize("bound", [0, -1, math.inf, math.nan])
def test_bound_must_be_positive_and_finite(make, bound):
    with pytest.raises(StreamError, match="the bound on the log-scale must be positive and finite"):
        AffineCoupling(make.net(4, 2), bound=bound)


def test_bound_shows_in_the_representation(make):
    assert "source=0, target=1, bound=1.5" in repr(AffineCoupling(make.net(4, 2), bound=1.5))
    assert "bound" not in repr(AffineCoupling(make.net(4, 2)))
