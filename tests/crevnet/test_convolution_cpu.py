"""Convolutions on a CPU: PyTorch's results and gradients by other ways, and PyTorch where those are not the ones."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from crevnet import convolution_cpu
from crevnet.convolution import convolution
from crevnet.convolution_cpu import _ways, convolve

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
PLAIN = {2: F.conv2d, 3: F.conv3d}
SHAPES = [
    *((1, 8, 4, (3, 4, 4)), (1, 32, 16, (6, 5)), (3, 33, 5, (2, 3, 4)), (4, 1, 2, (3, 4, 5)), (5, 2, 3, (7, 4))),
    *((4, 16, 17, (3, 4, 5)), (5, 20, 16, (7, 4)), (17, 4, 3, (2, 3, 5)), (18, 2, 1, (5, 7)), (16, 64, 96, (5, 4))),
]
"""Batch, inputs, outputs, size: between them they go all ways."""


@pytest.fixture(autouse=True, params=[False, True], ids=["narrow", "wide"])
def wide(request, monkeypatch):
    """Whatever the machine that the tests run on."""
    monkeypatch.setattr(convolution_cpu, "_wide", lambda: request.param)
    return request.param


def tensors(batch, inputs, outputs, size, kernel=3, dtype=torch.float32):
    x = torch.randn(batch, inputs, *size, dtype=dtype, requires_grad=True)
    weight = torch.randn(outputs, inputs, *(kernel,) * len(size), dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(outputs, dtype=dtype, requires_grad=True)


def plain(x, weight, bias):
    return PLAIN[x.ndim - 2](x, weight, bias, padding=weight.shape[-1] // 2)


def convolved(x, weight, bias):
    """PyTorch's where that is the faster one."""
    found = convolve(x, weight, bias)
    return plain(x, weight, bias) if found is None else found


def assert_as_in_float64(x, weight, bias):
    """Output and gradients, in units of the largest element."""
    out = convolved(x, weight, bias)
    grad = torch.randn_like(out)
    doubles = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = plain(*doubles)
    found = (out, *torch.autograd.grad(out, (x, weight, bias), grad))
    expected = (expected, *torch.autograd.grad(expected, doubles, grad.double()))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 2e-6 * other.abs().max()


def test_between_them_the_shapes_go_all_ways():
    ways = [
        _ways(torch.Size((b, i, *size)), torch.Size((o, i, *(3,) * len(size))), wide)
        for b, i, o, size in SHAPES
        for wide in (False, True)
    ]
    assert {way.onednn for way in ways} == {way.flipped for way in ways} == {False, True}
    assert {way.weight for way in ways} == {"pytorch", *convolution_cpu._WEIGHT_GRADIENTS}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_are_those_of_float64(shape, last):
    x, weight, bias = tensors(*shape)
    if last:
        layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        x = x.detach().contiguous(memory_format=layout).requires_grad_()
    assert_as_in_float64(x, weight, bias)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 18),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 20),
    size=st.lists(st.integers(1, 7), min_size=2, max_size=3),
    kernel=st.sampled_from([3, 5]),
)
def test_every_size(batch, inputs, outputs, size, kernel):
    assert_as_in_float64(*tensors(batch, inputs, outputs, tuple(size), kernel))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_gradients_the_same_bits(shape):
    x, weight, bias = tensors(*shape)
    with torch.no_grad():
        without = convolved(x, weight, bias)
    assert torch.equal(without, convolved(x, weight, bias))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_second_derivatives_are_pytorchs(shape):
    x, weight, bias = tensors(*shape)

    def second(function):
        (first,) = torch.autograd.grad(function(x, weight, bias).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, weight, bias))

    for one, other in zip(second(convolved), second(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_frozen_tensors_get_no_gradient(shape):
    x, weight, _ = tensors(*shape)
    out = convolved(x.detach(), weight, None)
    (found,) = torch.autograd.grad(out.sum(), weight)
    (expected,) = torch.autograd.grad(plain(x, weight, None).sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not convolved(x.detach(), weight.detach(), None).requires_grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flops_are_those_of_pytorch(shape):
    """Of output and input's gradient; the weight's gradient may take fewer or more."""
    x, weight, bias = tensors(*shape)
    counts = []
    for function in (convolved, plain):
        with FlopCounterMode(display=False) as counter:
            function(x, weight.detach(), bias).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_others_are_left_to_pytorch():
    x, weight, bias = tensors(*SHAPES[0])
    assert convolve(x, weight, bias) is not None
    assert convolve(x.double(), weight.double(), bias.double()) is None
    assert convolve(x[:0], weight, bias) is None
    assert convolve(x, weight[..., :1, :1, :1], bias) is None
    assert convolve(x[0], weight, bias) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve(x, weight, bias) is None
    with FakeTensorMode() as mode:
        assert convolve(mode.from_tensor(x), mode.from_tensor(weight), None) is None
    with torch.backends.mkldnn.flags(enabled=False):
        assert convolve(x, weight, bias) is None
    torch.func.vmap(lambda t: pytest.fail("vmap") if convolve(t, weight, None) is not None else t)(x[None])


def test_the_layer_falls_back():
    layer = convolution(3, 8, 4).double()
    assert layer(torch.randn(1, 8, 2, 3, 4, dtype=torch.float64)).shape == (1, 4, 2, 3, 4)
    with pytest.raises(RuntimeError, match="expected input"):
        convolution(3, 8, 4)(torch.randn(1, 7, 2, 3, 4))
