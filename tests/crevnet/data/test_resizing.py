import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crevnet.data import resize


@settings(deadline=None)
@given(st.integers(0, 255), st.integers(1, 9), st.integers(1, 9), st.integers(1, 20))
def test_flat_images_stay_flat(level, height, width, size):
    resized = resize(np.full((2, height, width), level, np.uint8), size)
    assert resized.dtype == np.uint8
    assert resized.shape == (2, size, size)
    assert (resized == level).all()


def test_right_size_is_returned_untouched():
    images = np.zeros((1, 4, 4), np.uint8)
    assert resize(images, 4) is images


def test_each_image_is_resized_alone_across_chunks(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8), np.uint8)
    whole = resize(images, 14)
    monkeypatch.setattr("crevnet.data.resizing._CHUNK_PIXELS", 3 * 8 * 8)
    assert (resize(images, 14) == whole).all()
    assert (np.concatenate([resize(images[i : i + 1], 14) for i in range(7)]) == whole).all()


def test_overshoot_is_clipped_not_wrapped():
    # Bicubic interpolation of a step exceeds both of its levels.
    step = np.zeros((1, 8, 8), np.uint8)
    step[:, :, 4:] = 255
    row = resize(step, 32)[0, 16].astype(int)
    assert (np.diff(row) >= 0).all()
    assert (row[0], row[-1]) == (0, 255)


def test_shrinking_averages_instead_of_skipping():
    # Every fourth column is white, and falls between the samples that plain interpolation would take.
    stripes = np.zeros((1, 32, 32), np.uint8)
    stripes[:, :, ::4] = 255
    middle = resize(stripes, 8)[0, 2:-2, 2:-2].astype(int)
    assert (abs(middle - 255 / 4) < 10).all()


@pytest.mark.parametrize(
    ("images", "size", "message"),
    [
        (np.zeros((1, 4, 4), np.uint8), 0, "size must be at least 1"),
        (np.zeros((4, 4), np.uint8), 2, "images must be uint8"),
        (np.zeros((1, 4, 4)), 2, "images must be uint8 or float32"),
    ],
)
def test_wrong_arguments(images, size, message):
    with pytest.raises(ValueError, match=message):
        resize(images, size)
