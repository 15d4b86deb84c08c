"""Gradients of weights by large matrix products: float64's, with errors like those of PyTorch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from crevnet import winograd_cpu
from crevnet.winograd_cpu import direct_weight_gradient, winograd_weight_gradient

BOTH = pytest.mark.parametrize("function", [direct_weight_gradient, winograd_weight_gradient])


def gradients(x, grad, kernel):
    """By PyTorch, in float64 and in the type of the input."""
    found = []
    for dtype in (torch.float64, x.dtype):
        weight = torch.zeros(grad.shape[1], x.shape[1], *kernel, dtype=dtype, requires_grad=True)
        out = F.conv3d(x.to(dtype), weight, padding=[k // 2 for k in kernel])
        found += torch.autograd.grad(out, weight, grad.to(dtype))
    return found


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 4),
    inputs=st.integers(1, 20),
    outputs=st.integers(1, 20),
    size=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    frames=st.sampled_from([1, 3, 5]),
    width=st.sampled_from([3, 5]),
)
def test_every_size(batch, inputs, outputs, size, frames, width):
    x, grad = torch.randn(batch, inputs, *size), torch.randn(batch, outputs, *size)
    kernel = (frames, 3, width)
    expected, _ = gradients(x, grad, kernel)
    found = [direct_weight_gradient(x, grad, kernel)]
    found += [winograd_weight_gradient(x, grad, kernel)] if width == 3 else []
    for one in found:
        assert one.shape == expected.shape
        assert error(one, expected) < 2e-6


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 128), (16, 16)])
def test_errors_are_at_most_four_times_those_of_direct_products(inputs, outputs, positive):
    """PyTorch's own are between the two."""
    x, grad = torch.randn(16, inputs, 3, 8, 8), torch.randn(16, outputs, 3, 8, 8)
    x = x.relu() if positive else x
    expected, _ = gradients(x, grad, (3, 3, 3))
    direct, filtered = (f(x, grad, (3, 3, 3)) - expected for f in (direct_weight_gradient, winograd_weight_gradient))
    assert filtered.square().mean() < 4**2 * direct.square().mean()


@BOTH
def test_chunks_of_samples_add_up(function, monkeypatch):
    x, grad = torch.randn(7, 5, 3, 6, 5), torch.randn(7, 3, 3, 6, 5)
    monkeypatch.setattr(winograd_cpu, "_SCRATCH", 3 * 24 * 3 * 3 * 2 * 5 * 3)  # three samples
    assert error(function(x, grad, (3, 3, 3)), gradients(x, grad, (3, 3, 3))[0]) < 2e-6


@BOTH
def test_the_same_bits_again_and_in_any_layout(function):
    x, grad = torch.randn(5, 16, 3, 8, 8), torch.randn(5, 32, 3, 8, 8)
    found = function(x, grad, (3, 3, 3))
    assert torch.equal(function(x, grad, (3, 3, 3)), found)
    last = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, grad))
    assert torch.equal(function(*last, (3, 3, 3)), found)


def test_an_output_of_the_transforms_is_a_convolution():
    of_output, of_weight, of_input = (t.double() for t in winograd_cpu._transforms())
    window, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    found = of_output.t() @ ((of_weight @ weight.flatten()) * (of_input @ window.flatten()))
    expected = F.conv2d(window[None, None], weight[None, None])
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: FakeTensorMode(allow_non_fake_inputs=True)])
def test_tables_made_in_any_mode_serve_training(mode):
    x, grad = torch.randn(2, 3, 3, 4, 4), torch.randn(2, 3, 3, 4, 4)
    winograd_cpu._places.cache_clear()
    winograd_cpu._transforms.cache_clear()
    with mode():
        places = winograd_cpu._places(2, (3, 4, 4), (2, 4), (4, 6), (1, 1))
        transforms = winograd_cpu._transforms()
    assert {type(t) for t in (places, *transforms)} == {torch.Tensor}
    assert not any(t.is_inference() for t in (places, *transforms))
    winograd_weight_gradient(x, grad, (3, 3, 3))
