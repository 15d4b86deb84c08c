from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from revgrad import Inverse, InvertibleConv1x1, ReversibleSequential, StreamError, invertible_conv

SHAPES = [(6, 4), (3, 4, 5), (2, 4, 3, 2), (2, 4, 2, 3, 1)]


def trained(channels=4):
    """A layer whose parameters have left their start."""
    layer = InvertibleConv1x1(channels).double()
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


@pytest.mark.parametrize("channels", [1, 2, 7, 64])
def test_starts_as_a_rotation(channels):
    layer = InvertibleConv1x1(channels)
    one = torch.eye(channels)
    torch.testing.assert_close(layer.weight() @ layer.weight().t(), one, atol=2e-5, rtol=0)
    torch.testing.assert_close(layer.inverse_weight(), layer.weight().t(), atol=2e-5, rtol=0)
    assert layer.log_volume().abs() < 1e-4


def test_inverse_weight_is_the_inverse_of_the_weight_and_the_determinant_is_right():
    layer = trained(9)
    weight = layer.weight()
    torch.testing.assert_close(layer.inverse_weight() @ weight, torch.eye(9, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(layer.log_volume(), torch.linalg.slogdet(weight).logabsdet)


def test_in_two_dimensions_it_is_a_convolution():
    layer, x = trained(), torch.randn(2, 4, 5, 3, dtype=torch.float64)
    expected = functional.conv2d(x, layer.weight()[:, :, None, None])
    torch.testing.assert_close(ReversibleSequential(layer)(x), expected)


@pytest.mark.parametrize("wrap", [lambda layer: layer, Inverse])
@pytest.mark.parametrize("shape", SHAPES)
def test_inverts_and_gradients_are_those_of_autograd(check, shape, wrap):
    chain = ReversibleSequential(wrap(trained()), wrap(trained()))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(chain.inverse(chain(x)), x)
    stored = check.gradients(chain, (x,), "stored")
    for mode in ("checkpoint", "reversible"):
        check.same(check.gradients(chain, (x,), mode), stored, rtol=1e-10)
    assert torch.autograd.gradcheck(chain, x)


def test_gradients_reach_the_parameters_that_count():
    layer = trained()
    ReversibleSequential(layer)(torch.randn(3, 4, dtype=torch.float64)).square().sum().backward()
    for p in (layer.lower.grad.tril(-1), layer.upper.grad.triu(1), layer.log_scale.grad):
        assert p.any()
    assert not layer.lower.grad.triu().any()
    assert not layer.upper.grad.tril().any()


def test_state_dict_restores_the_map():
    layer, other = trained(), InvertibleConv1x1(4).double()
    assert not torch.equal(other.weight(), layer.weight())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight(), layer.weight())
    assert torch.equal(other.inverse_weight(), layer.inverse_weight())


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_half_precision_and_autocast(parameters):
    layer = InvertibleConv1x1(4).to(parameters)
    chain, x = ReversibleSequential(layer), torch.randn(2, 4, 3, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = chain(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.dtype == parameters for p in layer.parameters())


def test_only_its_stream_is_touched():
    x = (torch.randn(2, 5), torch.randn(4, 3))
    y = ReversibleSequential(InvertibleConv1x1(3, target=1))(*x)
    assert torch.equal(y[0], x[0])
    assert not torch.equal(y[1], x[1])


def test_channels_must_fit():
    with pytest.raises(StreamError, match=r"layer 0 \(InvertibleConv1x1\): the stream must be \[B, 4, ...\]"):
        ReversibleSequential(InvertibleConv1x1(4))(torch.zeros(2, 3))
    with pytest.raises(StreamError, match=r"InvertibleConv1x1 has no exact form"):
        ReversibleSequential(InvertibleConv1x1(4), arithmetic="exact")(torch.zeros(2, 4))


def test_buffers_move_with_the_module():
    assert isinstance(InvertibleConv1x1(4), nn.Module)
    assert {b.device.type for b in InvertibleConv1x1(4).to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize(
    ("x", "inside"),
    [
        (SimpleNamespace(is_cuda=True, dtype=torch.float32), "ieee"),
        (SimpleNamespace(is_cuda=True, dtype=torch.bfloat16), "tf32"),
        (SimpleNamespace(is_cuda=False, dtype=torch.float32), "tf32"),
    ],
)
def test_products_in_float32_on_a_gpu_are_not_rounded_to_tensorfloat(x, inside):
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with invertible_conv._full_precision(x):
            assert matmul.fp32_precision == inside
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_both_directions_multiply_in_full_precision(monkeypatch):
    seen, original = [], invertible_conv._full_precision
    monkeypatch.setattr(invertible_conv, "_full_precision", lambda x: seen.append(x) or original(x))
    layer, x = InvertibleConv1x1(2), torch.randn(3, 2)
    layer.restored(layer.transformed(x))
    assert len(seen) == 2
