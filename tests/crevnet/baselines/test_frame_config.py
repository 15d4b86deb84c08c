import numpy as np
import pytest
import torch

from crevnet.baselines.frame_config import FrameConfig, check_layers


def test_a_frame_and_its_patches(literal):
    config = FrameConfig(image_size=12, channels=2, patch=3)
    assert (config.folded_channels, config.folded_size) == (18, (4, 4))
    frame = torch.rand(2, 2, 12, 12, dtype=torch.float64)
    folded = config.fold(frame)
    np.testing.assert_array_equal(folded.numpy(), literal.fold(frame.numpy(), 3))
    assert folded.shape == (2, config.folded_channels, *config.folded_size)
    assert torch.equal(config.unfold(folded), frame)


def test_a_patch_of_one_pixel_changes_nothing():
    config = FrameConfig(patch=1)
    frame = torch.rand(1, 1, 64, 64)
    assert torch.equal(config.fold(frame), frame)
    assert torch.equal(config.unfold(frame), frame)


def test_the_defaults():
    config = FrameConfig()
    assert (config.patch, config.clip, config.stacking) == (4, 1, "channels")
    assert (config.folded_size, config.folded_channels) == ((16, 16), 16)
    assert config.clip_shape() == (1, 64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 10}, r"model.image_size 10 is not a multiple of model.patch 4"),
        ({"patch": 0}, r"model.patch must be at least 1, got 0"),
        ({"clip": 2}, r"model.clip must be 1 and model.stacking 'channels' .* got 2 and 'channels'"),
        ({"stacking": "depth"}, r"model.clip must be 1 and model.stacking 'channels' .* got 1 and 'depth'"),
    ],
)
def test_what_cannot_be_read_frame_by_frame_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FrameConfig(**options)


@pytest.mark.parametrize(
    ("hidden", "kernel_size", "at_least", "message"),
    [
        ((), 3, 1, r"model.hidden must name 1 or more layers, .* got \(\)"),
        ((4,), 3, 2, r"model.hidden must name 2 or more layers, .* got \(4,\)"),
        ((4, 0), 3, 1, r"each of at least one channel, got \(4, 0\)"),
        ((4, 4), 4, 1, r"model.kernel_size must be odd, got 4"),
    ],
)
def test_layers_that_cannot_be_built_are_refused(hidden, kernel_size, at_least, message):
    with pytest.raises(ValueError, match=message):
        check_layers(hidden, kernel_size, at_least=at_least)


@pytest.mark.parametrize(("hidden", "kernel_size", "at_least"), [((1,), 1, 1), ((3, 1), 5, 2)])
def test_layers_that_can_be_built(hidden, kernel_size, at_least):
    check_layers(hidden, kernel_size, at_least=at_least)
