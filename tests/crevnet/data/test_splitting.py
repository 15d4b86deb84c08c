import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crevnet.data import DigitImages, hold_out


def numbered(labels: list[int]) -> DigitImages:
    """One distinct 1x2 image for each label: its two pixels spell its position."""
    positions = np.arange(len(labels))
    images = np.stack([positions // 256, positions % 256], -1).astype(np.uint8)[:, None]
    return DigitImages(images, np.array(labels, np.uint8), "numbered")


def test_last_part_of_every_label_is_held_out_in_file_order():
    kept, held = hold_out(numbered([0, 1] * 5), 0.4, ("kept", "held"))
    assert kept.images[:, 0, 1].tolist() == [0, 1, 2, 3, 4, 5]
    assert held.images[:, 0, 1].tolist() == [6, 7, 8, 9]
    assert (kept.name, held.name) == ("kept", "held")


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=2, max_size=60), st.floats(0.2, 0.8))
def test_sides_are_disjoint_complete_and_stratified(material, fraction):
    labels, pictures = (np.array(values, np.uint8) for values in zip(*material, strict=True))
    digits = DigitImages(pictures[:, None, None], labels, "repeated")
    try:
        kept, held = hold_out(digits, fraction, ("kept", "held"))
    except ValueError:
        assume(False)
    assert not set(kept.images.flat) & set(held.images.flat)
    both = sorted([*zip(kept.images.flat, kept.labels, strict=True), *zip(held.images.flat, held.labels, strict=True)])
    assert both == sorted(zip(pictures, labels, strict=True))
    first_label = {}
    for label, picture in material:
        first_label.setdefault(picture, label)
    for label in set(first_label.values()):
        distinct = {picture for picture, its_label in first_label.items() if its_label == label}
        assert len(distinct & set(held.images.flat)) == round(fraction * len(distinct))


def test_copies_follow_the_first_of_them():
    images = np.array([1, 2, 3, 4, 1], np.uint8)[:, None, None]
    kept, held = hold_out(DigitImages(images, np.zeros(5, np.uint8), "copies"), 0.25, ("kept", "held"))
    assert kept.images.flatten().tolist() == [1, 2, 3, 1]
    assert held.images.flatten().tolist() == [4]


@pytest.mark.parametrize("fraction", [-0.1, 0.0, 1.0, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1"):
        hold_out(numbered([0, 1]), fraction, ("kept", "held"))


@pytest.mark.parametrize("labels", [[], [3], [3, 4]])
def test_an_empty_side_is_refused(labels):
    with pytest.raises(ValueError, match=r"of numbered: one side would be empty; use more"):
        hold_out(numbered(labels), 0.1, ("kept", "held"))
