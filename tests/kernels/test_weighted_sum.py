import pytest
import torch
from revgrad_kernels import weighted_sum, weighted_sum_backward, weighted_sum_inverse

SHAPES = [(1,), (3, 5), (2, 3, 7, 5), (1025,)]
TOLERANCE = {torch.float32: 4e-7, torch.float64: 1e-15}


def inputs(shape, dtype, spread=1.5):
    return (
        torch.randn(shape, dtype=dtype) * spread,
        torch.randn(shape, dtype=dtype),
        torch.randn(shape, dtype=dtype),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weighted_sum_is_its_formula(shape, dtype):
    a, x, h = inputs(shape, dtype)
    gate = 1 / (1 + torch.exp(-a.double()))
    expected = (1 - gate) * x.double() + gate * h.double()
    found = weighted_sum(a, x, h)
    assert found.dtype == dtype
    size = torch.maximum(x.abs(), h.abs())
    assert ((found.double() - expected).abs() <= TOLERANCE[dtype] * size).all()


def test_closed_and_open_gate_pass_one_side_unchanged():
    _, x, h = inputs((7,), torch.float32)
    assert torch.equal(weighted_sum(torch.full((7,), -200.0), x, h), x)
    assert torch.equal(weighted_sum(torch.full((7,), 200.0), x, h), h)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_inverse_error_is_bounded_by_the_amplification(dtype):
    a, x, h = inputs((4001,), dtype)
    recovered = weighted_sum_inverse(a, weighted_sum(a, x, h), h)
    error = (recovered - x).abs()
    # The rounding of y and of the gate, amplified by 1 / (1 - g) = 1 + exp(a).
    bound = 4 * torch.finfo(dtype).eps * (1 + torch.exp(a)) * (x.abs() + h.abs())
    assert (error <= bound).all()
    # The bound is no slack: without the amplification it is broken.
    assert (error > 4 * torch.finfo(dtype).eps * (x.abs() + h.abs())).any()


def test_backward_is_the_gradient():
    a, x, h = (t.requires_grad_() for t in inputs((3, 5), torch.float64))
    grad = torch.randn(3, 5, dtype=torch.float64)
    gate = torch.sigmoid(a)
    expected = torch.autograd.grad((1 - gate) * x + gate * h, (a, x, h), grad)
    found = weighted_sum_backward(gate, gate * (1 - gate), x, h, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


def test_weighted_sum_gradcheck():
    assert torch.autograd.gradcheck(weighted_sum, [t.requires_grad_() for t in inputs((2, 3), torch.float64)])
    assert torch.autograd.gradcheck(weighted_sum_inverse, [t.requires_grad_() for t in inputs((2, 3), torch.float64)])
