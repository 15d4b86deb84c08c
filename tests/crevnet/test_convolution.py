import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from crevnet.convolution import check_odd, convolution, normalisation


@settings(max_examples=20, deadline=None)
@given(
    dimensions=st.sampled_from([2, 3]),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 4),
    kernel_size=st.sampled_from([1, 3, 5]),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
)
def test_a_convolution_keeps_the_size(dimensions, inputs, outputs, kernel_size, size):
    size = size[:dimensions]
    layer = convolution(dimensions, inputs, outputs, kernel_size)
    assert layer(torch.zeros(2, inputs, *size)).shape == (2, outputs, *size)
    assert layer.weight.shape == (outputs, inputs, *(kernel_size,) * dimensions)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_border_is_padded_with_zeros(dimensions):
    layer = convolution(dimensions, 1, 1, bias=False)
    nn.init.ones_(layer.weight)
    counts = layer(torch.ones(1, 1, *(3,) * dimensions))[0, 0]
    corner, centre = (0,) * dimensions, (1,) * dimensions
    assert counts[corner] == 2**dimensions
    assert counts[centre] == 3**dimensions


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_gradients_in_bfloat16_are_those_of_float32_rounded(depth, kernel_size, layout, autocast):
    """PyTorch's own are not on a CPU with AVX-512, where the kernel is deeper than the input."""
    torch.manual_seed(0)
    layer = convolution(3, 8, 8, kernel_size, bias=False).bfloat16()
    layer.weight.data = layer.weight.data.contiguous(memory_format=layout)
    x, g = torch.randn(2, 2, 8, depth, 6, 6).bfloat16()

    def found(layer, x):
        out = layer(x.requires_grad_())
        return out, *torch.autograd.grad(out, [x, layer.weight], g.to(out.dtype))

    wanted = found(copy.deepcopy(layer).float(), x.float())
    if autocast:
        layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rounded = found(layer, x)
    assert rounded[0].dtype is torch.bfloat16
    for a, b in zip(rounded, wanted, strict=True):
        assert float((a - b).detach().norm() / b.detach().norm()) < 0.01


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_is_optional(dimensions, bias):
    assert (convolution(dimensions, 2, 3, bias=bias).bias is not None) == bias


@pytest.mark.parametrize(
    ("dimensions", "kind", "expected"),
    [
        (2, "batch", nn.BatchNorm2d),
        (3, "batch", nn.BatchNorm3d),
        (2, "group", nn.GroupNorm),
        (3, "group", nn.GroupNorm),
        (2, "none", nn.Identity),
        (3, "none", nn.Identity),
    ],
)
def test_kinds_of_normalisation(dimensions, kind, expected):
    layer = normalisation(dimensions, 4, kind)
    assert type(layer) is expected
    x = torch.randn(3, 4, *(5,) * dimensions)
    assert layer(x).shape == x.shape


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (2, 1), (15, 1), (16, 1), (31, 1), (32, 2), (56, 2), (61, 1), (96, 6), (128, 8)],
)
def test_groups_hold_sixteen_channels(channels, groups):
    assert normalisation(2, channels, "group").num_groups == groups


@settings(deadline=None)
@given(channels=st.integers(1, 300))
def test_every_number_of_channels_can_be_normalised(channels):
    layer = normalisation(2, channels, "group")
    assert layer(torch.randn(1, channels, 2, 2)).shape == (1, channels, 2, 2)
    assert channels // layer.num_groups >= min(channels, 16)


def test_group_normalisation_matches_its_definition():
    x = torch.randn(2, 32, 3, 4, 5, dtype=torch.float64)
    groups = x.view(2, 2, 16, 3, 4, 5)
    mean = groups.mean((2, 3, 4, 5), keepdim=True)
    variance = groups.var((2, 3, 4, 5), keepdim=True, unbiased=False)
    expected = ((groups - mean) / (variance + 1e-5).sqrt()).view_as(x)
    torch.testing.assert_close(normalisation(3, 32, "group").double()(x), expected, atol=1e-12, rtol=0)


def test_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="'batch', 'group' or 'none', got 'layer'"):
        normalisation(2, 4, "layer")


@pytest.mark.parametrize("dimensions", [2, 3])
def test_an_even_kernel_does_not_keep_the_size(dimensions):
    with pytest.raises(ValueError, match="odd kernel_size, got 4"):
        convolution(dimensions, 1, 1, 4)


def test_kernels_of_odd_size_are_asked_for_by_the_name_of_their_option():
    check_odd("kernel_sizes", 1, 3, 5)
    for sizes in ((3, 2), (0, 1), (-1,)):
        with pytest.raises(ValueError, match=f"^model.kernel_sizes must be odd, got {', '.join(map(str, sizes))}$"):
            check_odd("kernel_sizes", *sizes)
