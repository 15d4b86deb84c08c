import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from revgrad import (
    Inverse,
    LayerCall,
    MomentumStep,
    Residue,
    ReversibleSequential,
    StreamError,
    VelocityCoupling,
    snap,
)

pytestmark = pytest.mark.usefixtures("single_thread")


def network(make, depth=5, gamma=0.8, **options):
    return ReversibleSequential(*(MomentumStep(make.net(4), gamma) for _ in range(depth)), **options)


def test_a_step_is_its_formula(make):
    x, v = make.streams(dtype=torch.float64, requires_grad=False)
    step = MomentumStep(make.net(4).double(), 0.7)
    step.arithmetic = "float"
    velocity = 0.7 * v + 0.3 * step[0].transform(x)
    found = step(x, v)
    torch.testing.assert_close(found[1], velocity)
    torch.testing.assert_close(found[0], x + velocity)


@pytest.mark.parametrize("wrap", [lambda layer: layer, Inverse])
def test_gradients_in_float(make, check, wrap):
    chain = ReversibleSequential(wrap(network(make)), arithmetic="float").double()
    x = make.streams(dtype=torch.float64)
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"), rtol=1e-11)
    assert torch.autograd.gradcheck(chain, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_in_exact_arithmetic_bit_for_bit(make, check, dtype):
    chain, x = network(make, 12, 0.3).to(dtype), make.streams(dtype=dtype)
    stored = check.gradients(chain, x, "stored")
    for mode in ("reversible", "checkpoint"):
        check.same(check.gradients(chain, x, mode), stored)
    # The straight-through gradient is that of the unrounded network up to the rounding of gamma and of the streams.
    chain.arithmetic = "float"
    check.same(stored, check.gradients(chain, x, "stored"), rtol=2e-3)


@given(
    seed=st.integers(0, 1000),
    gamma=st.one_of(st.floats(1e-6, 1 - 1e-6), st.sampled_from([1e-300, 2.0**-16, 0.5, 1 - 2.0**-16, 1 - 1e-16])),
    depth=st.integers(1, 9),
)
def test_exact_steps_restore_every_bit(seed, gamma, depth):
    torch.manual_seed(seed)
    layers = [VelocityCoupling(nn.Linear(3, 3), gamma=gamma) for _ in range(depth)]
    x, residue = tuple(map(snap, torch.randn(2, 4, 3))), Residue()
    y = x
    with torch.no_grad():
        for layer in layers:
            y = layer.run(y, LayerCall(residue=residue))
        assert not torch.equal(y[1], x[1])
        for layer in reversed(layers):
            y = layer.undo(y, LayerCall(residue=residue))
    assert all(map(torch.equal, y, x))
    residue.check_undone_to()


def test_residue_is_what_the_scaling_forgets(make):
    x, residue = tuple(map(snap, torch.randn(2, 200, 4))), Residue()
    with torch.no_grad():
        network(make, 50, 0.9)(*x, residue=residue)
    assert residue.used_bits / x[1].numel() == pytest.approx(50 * -math.log2(0.9), rel=0.02)


def test_backward_evaluates_f_once(make):
    for arithmetic in ("float", "exact"):
        chain = network(make, 3, arithmetic=arithmetic)
        y = chain(*make.streams())
        (y[0].sum() + y[1].sum()).backward()
        assert [step[0].transform.count[0] for step in chain] == [2, 2, 2]


def test_arithmetic_is_exact_unless_told_otherwise(make):
    """With a small momentum the float inverse is useless; the default is not."""
    chain, x = network(make, 30, 0.2), make.streams()
    chain(*x)[0].sum().backward()
    residue = Residue()
    with torch.no_grad():
        y = chain(*x, residue=residue)
        assert all(map(torch.equal, chain.inverse(*y, residue=residue), map(snap, x)))


def test_velocity_may_start_at_zero(make, check):
    for arithmetic in ("float", "exact"):
        chain = network(make, 8, 0.9, arithmetic=arithmetic)
        x = (torch.randn(3, 4, requires_grad=True), torch.zeros(3, 4))
        check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"), rtol=1e-4)


def test_exact_gradient_has_the_weights_that_were_used():
    layer = VelocityCoupling(nn.Identity(), gamma=1.4 * 2.0**-16)
    x, f = torch.zeros(2, 3), torch.ones(2, 3)
    for exact, g in ((True, 2.0**-16), (False, 1.4 * 2.0**-16)):
        found = layer.merge_vjp(torch.ones(2, 3), exact, x, f)
        assert [float(t[0, 0]) for t in found] == pytest.approx([g, 1 - g], rel=1e-6)


def test_message_in_another_dtype(make, check):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make.net(4)

        def forward(self, x):
            return self.net(x).bfloat16()

    for arithmetic in ("float", "exact"):
        chain = ReversibleSequential(VelocityCoupling(Half()), arithmetic=arithmetic)
        x = make.streams()
        check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"))


@pytest.mark.parametrize("gamma", [0, 1, -0.1, 1.5, math.nan])
def test_momentum_must_be_inside_zero_and_one(make, gamma):
    with pytest.raises(StreamError, match="gamma must be between 0 and 1, both excluded"):
        MomentumStep(make.net(4), gamma)


def test_momentum_shows_in_the_representation(make):
    assert "source=0, target=1, gamma=0.75" in repr(MomentumStep(make.net(4), 0.75))
