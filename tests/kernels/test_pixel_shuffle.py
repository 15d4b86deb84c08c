import pytest
import torch
from revgrad_kernels import pixel_shuffle, pixel_unshuffle
from torch.nn import functional as F

CASES = [((2, 3, 4, 6), 2), ((1, 1, 9, 3), 3), ((2, 2, 5, 7), 1), ((3, 1, 4, 4), 4)]


@pytest.mark.parametrize(("shape", "factor"), CASES)
def test_two_dimensions_are_pytorchs_order(shape, factor):
    x = torch.randn(shape)
    folded = pixel_unshuffle(x, factor)
    assert torch.equal(folded, F.pixel_unshuffle(x, factor))
    assert torch.equal(pixel_shuffle(folded, factor), x)
    assert torch.equal(pixel_shuffle(folded, factor), F.pixel_shuffle(folded, factor))


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize(("shape", "factor"), CASES)
def test_three_dimensions_fold_every_frame_by_itself(shape, factor, frames):
    x = torch.randn(shape[0], shape[1], frames, *shape[2:])
    folded = pixel_unshuffle(x, factor)
    assert folded.shape[2] == frames
    for t in range(frames):
        assert torch.equal(folded[:, :, t], F.pixel_unshuffle(x[:, :, t], factor))
    assert torch.equal(pixel_shuffle(folded, factor), x)


def test_channel_order_as_documented():
    x = torch.arange(16).view(1, 1, 4, 4)
    folded = pixel_unshuffle(x, 2)
    for i in range(2):
        for j in range(2):
            assert torch.equal(folded[0, i * 2 + j], x[0, 0, i::2, j::2])


@pytest.mark.parametrize("operator", [pixel_shuffle, pixel_unshuffle])
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (1, 4, 1, 1, 4, 4)])
def test_wrong_number_of_dimensions(operator, shape):
    with pytest.raises(ValueError, match=rf"{operator.__name__}: expected .* got shape \({shape[0]}, {shape[1]}"):
        operator(torch.zeros(shape), 2)


@pytest.mark.parametrize("size", [(5, 4), (4, 5)])
def test_unshuffle_of_indivisible_frames_says_what_to_do(size):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels cannot be folded by 2; pad or resize"):
        pixel_unshuffle(torch.zeros(1, 1, *size), 2)


def test_shuffle_of_indivisible_channels():
    with pytest.raises(ValueError, match="6 channels are not a multiple of 2 x 2"):
        pixel_shuffle(torch.zeros(1, 6, 2, 2), 2)


@pytest.mark.parametrize("operator", [pixel_shuffle, pixel_unshuffle])
def test_factor_below_one(operator):
    with pytest.raises(ValueError, match=operator.__name__):
        operator(torch.zeros(1, 4, 4, 4), 0)
