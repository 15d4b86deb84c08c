import numpy as np
import pytest

from crevnet.data import DigitImages

IMAGES = np.arange(3 * 2 * 4, dtype=np.uint8).reshape(3, 2, 4)
LABELS = np.array([7, 1, 7], np.uint8)


def test_length_and_take():
    digits = DigitImages(IMAGES, LABELS, "three")
    taken = digits.take(np.array([2, 0]), "two")
    assert len(digits) == 3
    assert len(taken) == 2
    assert taken.name == "two"
    assert (taken.images == IMAGES[[2, 0]]).all()
    assert taken.labels.tolist() == [7, 7]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.astype(np.float32), LABELS, "images of odd must be uint8 with 3"),
        (IMAGES[0], LABELS, "images of odd must be uint8 with 3"),
        (IMAGES, LABELS.astype(np.int64), "labels of odd must be uint8 with 1"),
        (IMAGES, LABELS[:, None], "labels of odd must be uint8 with 1"),
        (IMAGES, LABELS[:2], "odd: 3 images but 2 labels"),
    ],
)
def test_wrong_arrays_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        DigitImages(images, labels, "odd")
