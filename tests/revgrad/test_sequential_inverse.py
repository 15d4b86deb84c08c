"""The inverse of a chain: streams and states come back."""

import pytest
import torch

from revgrad import (
    Residue,
    ReversibilityError,
    StreamError,
    snap,
)
from tests.revgrad.test_sequential import gated_chain

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.parametrize("kind", ["additive", "affine", "gated"])
def test_inverse_in_float_is_differentiable(make, kind):
    chain = make.chain(kind, 3, arithmetic="float").double()
    y = make.streams(dtype=torch.float64)
    x = chain.inverse(*y)
    with torch.no_grad():
        for back, then in zip(chain(*x), y, strict=True):
            torch.testing.assert_close(back, then, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(chain.inverse, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [1, 16, 60])
def test_exact_inverse_restores_every_bit_at_any_depth(depth, dtype):
    chain = gated_chain(depth).to(dtype)
    x = tuple(snap(torch.randn(32, 64, dtype=dtype)) for _ in range(2))
    residue = Residue()
    with torch.no_grad():
        y = chain(*x, residue=residue)
        back = chain.inverse(*y, residue=residue)
    assert all(map(torch.equal, back, x))
    residue.check_undone_to()


def test_float_inverse_of_ordinary_gates_is_worthless():
    """Why exact is the default: 16 gated updates with gates sigmoid(N(0, 1.5)), values of order one."""
    chain = gated_chain(16, arithmetic="float")
    x = tuple(torch.randn(256, 64) for _ in range(2))
    with torch.no_grad():
        back = chain.inverse(*chain(*x))
    assert max(float((a - b).abs().max()) for a, b in zip(back, x, strict=True)) > 1e3


@pytest.mark.parametrize("input_gradient", [True, False])
def test_float_gradient_of_ordinary_gates_is_refused_not_wrong(input_gradient):
    chain = gated_chain(16, arithmetic="float")
    x = tuple(torch.randn(256, 64, requires_grad=input_gradient) for _ in range(2))
    y = chain(*x)
    with pytest.raises(ReversibilityError, match=r"or not precisely enough.*arithmetic='exact'"):
        (y[0].sum() + y[1].square().sum()).backward()
    assert all(p.grad is None for p in chain.parameters())


def test_inverse_with_states(make):
    chain = make.recurrent("gated", 4)
    x, state = tuple(map(snap, make.streams())), make.state(chain)
    residue = Residue()
    with torch.no_grad():
        y, _ = chain(*x, states=state, residue=residue)
        back = chain.inverse(*y, states=state, residue=residue)
    assert all(map(torch.equal, back, x))


def test_inverse_with_wrong_states_is_noticed(make):
    chain = make.recurrent("gated", 4, width=8)
    x, state = make.streams(50, 8), make.state(chain, 50, 8)
    residue = Residue()
    with torch.no_grad():
        for _ in range(20):
            y, _ = chain(*x, states=state, residue=residue)

        def undo_all():
            for _ in range(20):
                chain.inverse(*y, states=make.state(chain, 50, 8), residue=residue)

        with pytest.raises(ReversibilityError, match="does not fit the gates"):
            undo_all()


def test_inverse_needs_what_determines_it(make):
    gated = make.chain("gated", 2)
    x = make.streams(requires_grad=False)
    with pytest.raises(ReversibilityError, match="needs the residue of the forward pass"):
        gated.inverse(*x)
    zigzag = make.recurrent("gated", 2, carries=1)
    with pytest.raises(StreamError, match="inverse: what one layer carries to the next"):
        zigzag.inverse(*x, states=make.state(zigzag))
