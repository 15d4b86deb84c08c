"""Masked convolutions and multiplicative blocks against their definitions in loops; what a pixel sees and may see."""

import numpy as np
import pytest
import torch

from crevnet.baselines.pixel_cnn import (
    MaskedConvolution,
    MultiplicativeUnit,
    PixelDecoder,
    RasterScan,
    ResidualMultiplicativeBlock,
)


def array(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shares(channels, pixel_channels, copies=1):
    """Which channel of a pixel each feature channel belongs to: equal shares, in order."""
    share = [c * pixel_channels // (channels // copies) for c in range(channels // copies)]
    return share * copies


def masked_conv(oracle, layer, x, of_input, of_output, strict):
    """Term by term, leaving out what is not before the output in the order row, column, channel of the pixel."""
    weight, bias = oracle.array(layer.weight), oracle.array(layer.bias)
    radius = weight.shape[2] // 2
    height, width = x.shape[2:]
    out = np.zeros((len(x), len(weight), height, width))
    for o, row, column in np.ndindex(*out.shape[1:]):
        out[:, o, row, column] = bias[o]
        for i, y, z in np.ndindex(x.shape[1], height, width):
            near = abs(y - row) <= radius and abs(z - column) <= radius
            here, there = (row, column, of_output[o]), (y, z, of_input[i])
            if near and (there < here or (there == here and not strict)):
                out[:, o, row, column] += weight[o, i, y - row + radius, z - column + radius] * x[:, i, y, z]
    return out


@pytest.mark.parametrize("mask", ["A", "B"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize(("inputs", "outputs", "pixel", "copies"), [(1, 2, 1, 1), (3, 8, 2, 2), (4, 3, 3, 1)])
def test_masked_convolution_sees_what_is_before_and_nothing_else(
    oracle, mask, kernel_size, inputs, outputs, pixel, copies
):
    layer = oracle.randomise(MaskedConvolution(inputs, outputs, kernel_size, pixel, mask, copies))
    x = array(1, 2, inputs, 4, 3)
    expected = masked_conv(
        oracle, layer, x.numpy(), shares(inputs, pixel), shares(outputs, pixel, copies), strict=mask == "A"
    )
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-13)


def test_a_mask_is_no_weight():
    layer = MaskedConvolution(1, 1, 3, 1, "A")
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    layer(torch.rand(1, 1, 5, 5)).sum().backward()
    assert layer.weight.grad.bool().flatten().tolist() == [True] * 4 + [False] * 5


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_scan_computes_pixel_by_pixel_what_the_layer_computes_at_once(oracle, kernel_size):
    layer = oracle.randomise(MaskedConvolution(3, 4, kernel_size, 1, "B"))
    x = array(1, 2, 3, 5, 6)
    scan = RasterScan(6)
    found = torch.zeros(2, 4, 5, 6, dtype=torch.float64)
    for row in range(5):
        scan.start_row()
        for scan.column in range(6):
            found[:, :, row, scan.column] = scan(layer, x[:, :, row : row + 1, [scan.column]])[:, :, 0, 0]
    torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-13)


def unit(oracle, convolve, h):
    g3, g2, u, g1 = np.split(convolve(h), 4, axis=1)
    return oracle.sigmoid(g1) * np.tanh(oracle.sigmoid(g2) * h + oracle.sigmoid(g3) * np.tanh(u))


def test_multiplicative_unit(oracle):
    layer = oracle.randomise(torch.nn.Conv2d(3, 12, 3, padding=1))
    h = array(1, 2, 3, 4, 5)
    expected = unit(oracle, lambda h: oracle.conv(layer, h), h.numpy())
    np.testing.assert_allclose(MultiplicativeUnit(layer)(h).detach().numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("pixel_channels", [0, 1, 2])
def test_residual_multiplicative_block(oracle, pixel_channels):
    block = oracle.randomise(ResidualMultiplicativeBlock(2, 3, pixel_channels=pixel_channels))
    h = array(1, 2, 4, 3, 4)

    def convolve(layer, x, copies=1):
        if not pixel_channels:
            return oracle.conv(layer, x)
        of_output = shares(layer.out_channels, pixel_channels, copies)
        return masked_conv(oracle, layer, x, shares(layer.in_channels, pixel_channels), of_output, strict=False)

    x = convolve(block.narrow, h.numpy())
    for mu in (block.first, block.second):
        x = unit(oracle, lambda h, mu=mu: convolve(mu.gates, h, 4), x)
    expected = h.numpy() + convolve(block.widen, x)
    np.testing.assert_allclose(block(h).detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_dilation_keeps_the_size_and_spreads_the_view(dilation):
    block = ResidualMultiplicativeBlock(2, 3, dilation=dilation)
    h = torch.rand(1, 4, 21, 21, requires_grad=True)
    block(h)[0, 0, 10, 10].backward()
    rows = h.grad[0].abs().sum(dim=(0, 2)).nonzero().flatten()
    assert rows.tolist() == list(range(10 - 2 * dilation, 11 + 2 * dilation, dilation))


def decoder(oracle, channels, width=4):
    return oracle.randomise(PixelDecoder(channels, width, 2, 3))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_pixel_depends_on_the_pixels_before_it_only(oracle, channels):
    """The Jacobian, entry by entry; the nearest values before do count, as does the context around."""
    model, side = decoder(oracle, channels), 5
    frame = array(1, 1, channels, side, side).requires_grad_()
    context = array(2, 1, 8, side, side).requires_grad_()
    logits = model(frame, context)
    place = torch.arange(side * side).view(1, side, side) * channels + torch.arange(channels).view(-1, 1, 1)
    for k, row, column in np.ndindex(channels, side, side):
        seen, around = torch.autograd.grad(logits[0, k, row, column], (frame, context), retain_graph=True)
        here = int(place[k, row, column])
        assert not seen[0][place >= here].any()
        if column:
            assert seen[0, :, row, column - 1].all()
        if row:
            assert seen[0, :, row - 1, column].all()
        assert seen[0, :k, row, column].all()
        assert around[0, :, row, column].any()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_generated_values_are_the_means_given_the_values_before(oracle, channels):
    model, context = decoder(oracle, channels), array(2, 2, 8, 4, 6)
    frame = model.generate(context)
    assert frame.shape == (2, channels, 4, 6)
    assert not frame.requires_grad
    torch.testing.assert_close(frame, torch.sigmoid(model(frame, context)), rtol=0, atol=1e-12)


def test_generation_in_full_passes_is_the_same(oracle):
    """One pass over the whole frame per value, of which all but that value is thrown away."""
    model, context = decoder(oracle, 2), array(2, 1, 8, 3, 3)
    frame = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    for row, column, k in np.ndindex(3, 3, 2):
        frame[:, k, row, column] = torch.sigmoid(model(frame, context))[:, k, row, column].detach()
    torch.testing.assert_close(model.generate(context), frame, rtol=0, atol=1e-12)
