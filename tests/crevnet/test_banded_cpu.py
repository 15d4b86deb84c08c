"""Gradients of weights by banded matrices: those of float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from crevnet.banded_cpu import banded_weight_gradient


def assert_as_in_float64(batch, inputs, outputs, size, kernel):
    x, grad = torch.randn(batch, inputs, *size), torch.randn(batch, outputs, *size)
    weight = torch.zeros(outputs, inputs, *kernel, dtype=torch.float64, requires_grad=True)
    out = F.conv3d(x.double(), weight, padding=[k // 2 for k in kernel])
    (expected,) = torch.autograd.grad(out, weight, grad.double())
    found = banded_weight_gradient(x, grad, kernel)
    assert found.shape == weight.shape
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 4),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    size=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.just(3), st.sampled_from([1, 3, 5])),
)
def test_every_size(batch, inputs, outputs, size, kernel):
    assert_as_in_float64(batch, inputs, outputs, size, kernel)


@pytest.mark.parametrize("batch", [16, 17, 40])
def test_chunks_of_samples_add_up(batch):
    assert_as_in_float64(batch, 2, 3, (3, 5, 4), (3, 3, 3))


def test_the_same_bits_again_and_in_any_layout():
    x, grad = torch.randn(17, 4, 3, 8, 8), torch.randn(17, 8, 3, 8, 8)
    found = banded_weight_gradient(x, grad, (3, 3, 3))
    assert torch.equal(banded_weight_gradient(x, grad, (3, 3, 3)), found)
    last = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, grad))
    assert torch.equal(banded_weight_gradient(*last, (3, 3, 3)), found)
