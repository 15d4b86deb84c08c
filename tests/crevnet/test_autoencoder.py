import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from crevnet.autoencoder import residual_function, two_way_autoencoder
from crevnet.convolution import Convolution2d
from revgrad import AdditiveCoupling, Inverse, PixelUnshuffle, ReversibleSequential, Split, StreamError, snap

NORMS = ["group", "batch", "none"]


def convolutions(module):
    return [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]


def frames(channels, dimensions, batch=2, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = (3, side, side) if dimensions == 3 else (side, side)
    return torch.rand(batch, channels, *size, generator=generator)


def settle(encoder, x):
    """Give normalisation layers running statistics that are not those of a new layer."""
    with torch.no_grad():
        encoder.train()(x * 3 - 1)
    return encoder


def test_the_papers_network_has_twelve_blocks_of_three_convolutions():
    encoder = two_way_autoencoder(1, 3)
    couplings = [layer for layer in encoder if isinstance(layer, AdditiveCoupling)]
    assert [len(convolutions(c)) for c in couplings] == [3] * 12
    assert len(convolutions(encoder)) == 36
    assert all(isinstance(c, nn.Conv3d) and c.kernel_size == (3, 3, 3) for c in convolutions(encoder))
    kinds = "".join({PixelUnshuffle: "p", Split: "s", AdditiveCoupling: "c"}[type(layer)] for layer in encoder)
    assert kinds == "ps" + "cccc" + "p" + "ccccc" + "p" + "ccc"


@pytest.mark.parametrize("blocks", [(4, 6, 6), (4, 4, 4, 4), (16,)])
def test_forty_eight_layers_by_configuration(blocks):
    assert len(convolutions(two_way_autoencoder(3, 2, blocks=blocks))) == 48


def test_streams_of_the_papers_clips():
    encoder = two_way_autoencoder(1, 3)
    with torch.no_grad():
        streams = encoder(torch.rand(2, 1, 3, 64, 64))
    assert [tuple(s.shape) for s in streams] == [(2, 32, 3, 8, 8)] * 2


def test_the_couplings_alternate_through_all_stages():
    couplings = [layer for layer in two_way_autoencoder(1, 3) if isinstance(layer, AdditiveCoupling)]
    assert [(c.source, c.target) for c in couplings] == [(1, 0), (0, 1)] * 6


@pytest.mark.parametrize("norm", NORMS)
def test_a_block_is_normalisation_relu_convolution_three_times(norm):
    f = residual_function(2, 8, 2, norm)
    kind = {"group": nn.GroupNorm, "batch": nn.BatchNorm2d, "none": nn.Identity}[norm]
    assert [type(m) for m in f] == [kind, nn.ReLU, Convolution2d] * 3
    assert [(c.in_channels, c.out_channels) for c in convolutions(f)] == [(8, 4), (4, 4), (4, 8)]
    assert all((c.bias is not None) == (norm == "none") for c in convolutions(f))


@pytest.mark.parametrize("norm", NORMS)
def test_only_the_first_block_reads_its_input_as_it_is(norm):
    couplings = [m for m in two_way_autoencoder(1, 2, blocks=(2, 2), norm=norm) if isinstance(m, AdditiveCoupling)]
    assert [isinstance(c.transform[0], nn.Conv2d) for c in couplings] == [True, False, False, False]


@pytest.mark.parametrize("bottleneck", [1, 2, 4, 1000])
def test_the_bottleneck_narrows_the_inner_convolutions(bottleneck):
    inner = max(1, 32 // bottleneck)
    widths = [(c.in_channels, c.out_channels) for c in convolutions(residual_function(3, 32, bottleneck, "none"))]
    assert widths == [(32, inner), (inner, inner), (inner, 32)]


@pytest.mark.parametrize("norm", NORMS)
def test_matches_equation_two_written_out(norm):
    x = frames(2, 2).double()
    encoder = settle(two_way_autoencoder(2, 2, blocks=(2, 1), norm=norm).double(), x).eval()
    encoder.arithmetic = "float"
    f1, f2, f3 = (layer.transform for layer in encoder if isinstance(layer, AdditiveCoupling))
    with torch.no_grad():
        found = encoder(x)
        first, second = F.pixel_unshuffle(x, 2).chunk(2, dim=1)
        first = first + f1(second)
        second = second + f2(first)
        first, second = (F.pixel_unshuffle(s, 2) for s in (first, second))
        first = first + f3(second)
    torch.testing.assert_close(found, (first, second), atol=1e-12, rtol=0)
    assert not torch.equal(found[0], F.pixel_unshuffle(F.pixel_unshuffle(x, 2)[:, :4], 2)), "the blocks do something"


@settings(max_examples=25, deadline=None)
@given(
    channels=st.integers(1, 3),
    dimensions=st.sampled_from([2, 3]),
    blocks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    bottleneck=st.integers(1, 4),
    norm=st.sampled_from(NORMS),
    training=st.booleans(),
)
def test_shapes_and_exact_inverse(channels, dimensions, blocks, bottleneck, norm, training):
    x = frames(channels, dimensions, side=16)
    encoder = settle(two_way_autoencoder(channels, dimensions, blocks=blocks, bottleneck=bottleneck, norm=norm), x)
    encoder.train(training).arithmetic = "exact"
    stages = len(blocks)
    with torch.no_grad():
        streams = encoder(x)
        side, time = 16 // 2**stages, (3,) * (dimensions - 2)
        assert [s.shape for s in streams] == [(2, 2 * channels * 4 ** (stages - 1), *time, side, side)] * 2
        assert sum(s.numel() for s in streams) == x.numel(), "volume-preserving"
        assert torch.equal(encoder.inverse(*streams), snap(x))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_the_decoder_undoes_the_papers_encoder_and_the_other_way_round(dimensions, norm, training, arithmetic):
    x = frames(1, dimensions)
    encoder = settle(two_way_autoencoder(1, dimensions, norm=norm), x).train(training)
    decoder = Inverse(encoder)
    there = ReversibleSequential(encoder, decoder, arithmetic=arithmetic)
    back = ReversibleSequential(decoder, encoder, arithmetic=arithmetic)
    with torch.no_grad():
        clip = there(x)
        streams = tuple(s + 0.25 for s in ReversibleSequential(encoder, arithmetic=arithmetic)(x))
        again = back(*streams)
    if arithmetic == "exact":
        assert torch.equal(clip, snap(x))
        assert all(torch.equal(a, b) for a, b in zip(again, streams, strict=True))
    else:
        torch.testing.assert_close(clip, x, atol=1e-5, rtol=0)
        torch.testing.assert_close(again, streams, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_the_jacobian_has_determinant_one(norm):
    x = frames(1, 2, batch=1, side=8).double()
    encoder = settle(two_way_autoencoder(1, 2, blocks=(2, 2), norm=norm).double(), x).eval()
    encoder.mode = "stored"
    jacobian = torch.autograd.functional.jacobian(lambda v: torch.cat(encoder(v), dim=1), x).view(64, 64)
    assert float(torch.linalg.slogdet(jacobian).logabsdet) == pytest.approx(0, abs=1e-10)
    assert not torch.equal(jacobian.abs() > 0, jacobian.abs() == 1), "not merely a permutation"


def test_gradients_through_encoder_and_decoder_with_shared_weights():
    encoder = two_way_autoencoder(1, 2, blocks=(1, 1)).double()
    x = frames(1, 2, batch=1, side=4).double().requires_grad_()
    # Something in between, or decoding would undo encoding and every gradient of a weight would vanish.
    middle = AdditiveCoupling(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()).double())
    chain = ReversibleSequential(encoder, middle, Inverse(encoder))
    names = [name for name, _ in chain.named_parameters()]
    parameters = [p.detach().requires_grad_() for p in chain.parameters()]

    def call(x, *values):
        return torch.func.functional_call(chain, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)


def test_a_gray_frame_of_one_channel_is_split_after_folding():
    streams = two_way_autoencoder(1, 2, blocks=(1,))(frames(1, 2, side=2))
    assert [tuple(s.shape) for s in streams] == [(2, 2, 1, 1)] * 2


def test_frames_that_cannot_be_folded_are_refused():
    with pytest.raises(ValueError, match="pixels cannot be folded by 2"):
        two_way_autoencoder(1, 2)(frames(1, 2, side=12))


def test_a_second_stream_is_refused():
    x = frames(1, 2)
    with pytest.raises(StreamError, match="Split takes one stream, got 2"):
        two_way_autoencoder(1, 2)(x, x)


def test_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="'batch', 'group' or 'none'"):
        two_way_autoencoder(1, 2, norm="layer")
