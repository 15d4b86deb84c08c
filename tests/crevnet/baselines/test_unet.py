import numpy as np
import pytest
import torch
from torch import nn

from crevnet.baselines.unet import UNet, two_convolutions

SHAPES = {2: (4, 8), 3: (3, 4, 8)}


def pool(x):
    """The largest of every 2 x 2 pixels."""
    out = np.zeros((*x.shape[:-2], x.shape[-2] // 2, x.shape[-1] // 2))
    for i, j in np.ndindex(*out.shape[-2:]):
        out[..., i, j] = x[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max(axis=(-2, -1))
    return out


def up(layer, x, oracle):
    """Every position becomes 2 x 2 pixels."""
    weight, bias = oracle.array(layer.weight), oracle.array(layer.bias)
    out = np.zeros((x.shape[0], weight.shape[1], *x.shape[2:-2], 2 * x.shape[-2], 2 * x.shape[-1]))
    for b, o, *time, i, j in np.ndindex(*out.shape):
        read = x[(b, slice(None), *time, i // 2, j // 2)]
        taps = weight[(slice(None), o, *([0] * len(time)), i % 2, j % 2)]
        out[(b, o, *time, i, j)] = read @ taps + bias[o]
    return out


def twice(layers, x, oracle):
    for convolution in (layers[0], layers[2]):
        x = np.maximum(oracle.conv(convolution, x), 0)
    return x


def literal(unet, x, oracle):
    """Figure 1 of Ronneberger et al. with two stages, line by line."""
    first = twice(unet.down[0], x, oracle)
    second = twice(unet.down[1], pool(first), oracle)
    features = twice(unet.down[2], pool(second), oracle)
    y = twice(unet.merge[0], np.concatenate([second, up(unet.up[0], features, oracle)], axis=1), oracle)
    y = twice(unet.merge[1], np.concatenate([first, up(unet.up[1], y, oracle)], axis=1), oracle)
    return features, oracle.conv(unet.head, y)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_matches_the_figure_of_its_paper(dimensions, oracle):
    unet = oracle.randomise(UNet(2, dimensions, width=3, stages=2), scale=0.2)
    x = torch.randn(2, 2, *SHAPES[dimensions], dtype=torch.float64)
    features, output = literal(unet, x.numpy(), oracle)
    np.testing.assert_allclose(oracle.array(unet.encode(x)[0]), features, rtol=0, atol=1e-12)
    np.testing.assert_allclose(oracle.array(unet(x)), output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(("width", "stages"), [(8, 3), (4, 1)])
def test_features_and_skips(dimensions, width, stages):
    unet = UNet(1, dimensions, width=width, stages=stages)
    time = SHAPES[dimensions][:-2]
    features, skips = unet.encode(torch.rand(2, 1, *time, 16, 32))
    assert features.shape == (2, width * 2**stages, *time, 16 // 2**stages, 32 // 2**stages)
    assert [s.shape for s in skips] == [(2, width * 2**i, *time, 16 // 2**i, 32 // 2**i) for i in range(stages)]
    assert unet.decode(features, skips).shape == (2, 1, *time, 16, 32)


def test_time_is_convolved_but_not_pooled():
    unet = UNet(1, 3, width=2, stages=2)
    kernels = {m.kernel_size for m in unet.modules() if isinstance(m, nn.Conv3d)}
    assert kernels == {(3, 3, 3), (1, 1, 1)}
    assert {m.kernel_size for m in unet.modules() if isinstance(m, nn.ConvTranspose3d)} == {(1, 2, 2)}


def test_initial_weights_have_the_variance_of_he():
    unet = UNet(1, 2, width=64, stages=1)
    for layer in (unet.down[1][0], unet.up[0], unet.merge[0][0]):
        inputs = layer.in_channels * (9 if isinstance(layer, nn.Conv2d) else 1)
        assert layer.weight.std().item() == pytest.approx((2 / inputs) ** 0.5, rel=0.05)


def test_the_last_convolution_starts_with_pytorchs_weights():
    """Uniform within one over the root of the inputs, which is less than He's: no ReLU follows."""
    head = UNet(64, 2, width=64, stages=1).head
    assert head.weight.std().item() == pytest.approx((1 / 64 / 3) ** 0.5, rel=0.05)
    assert head.weight.abs().max().item() <= 1 / 64**0.5


def test_every_weight_gets_a_gradient():
    unet = UNet(1, 2, width=4, stages=2)
    unet(torch.rand(2, 1, 8, 8)).square().sum().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_learns_to_copy():
    """What only skip connections make easy: a frame of noise."""
    unet = UNet(1, 2, width=8, stages=2)
    x = torch.rand(2, 1, 16, 16)
    optimiser = torch.optim.Adam(unet.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (unet(x) - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_two_convolutions_are_that():
    assert [type(m).__name__ for m in two_convolutions(3, 1, 4)] == ["Convolution3d", "ReLU", "Convolution3d", "ReLU"]
