import pytest
import torch

from revgrad import AdditiveCoupling, Residue, snap


def test_merge_and_its_derivatives_are_their_formulas(make):
    x, t, grad = torch.randn(3, 2, 4, dtype=torch.float64).unbind()
    layer = AdditiveCoupling(make.net(4))
    assert torch.equal(layer.merge(x, t), x + t)
    assert torch.equal(layer.unmerge(x, t), x - t)
    assert all(map(torch.equal, layer.merge_vjp(grad, False, x, t), (grad, grad)))
    assert all(map(torch.equal, layer.unmerge_vjp(grad, False, x, t), (grad, -grad)))
    assert layer.log_derivative(x, t) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_merge_adds_the_rounded_message_and_forgets_nothing(make, dtype):
    x, t = snap(torch.randn(300, dtype=dtype)), torch.randn(300, dtype=dtype)
    layer, residue = AdditiveCoupling(make.net(4)), Residue()
    merged = layer.merge_exact(residue, x, t)
    assert torch.equal(merged, x + snap(t))
    assert torch.equal(layer.unmerge_exact(residue, merged, t), x)
    assert not layer.forgets
    assert residue.bits == 0


def test_gradient_of_a_message_in_another_dtype_has_that_dtype(make):
    layer = AdditiveCoupling(make.net(4))
    grad, message = torch.randn(2, 4), torch.randn(2, 4, dtype=torch.bfloat16)
    for vjp in (layer.merge_vjp, layer.unmerge_vjp):
        assert [g.dtype for g in vjp(grad, False, grad, message)] == [torch.float32, torch.bfloat16]
