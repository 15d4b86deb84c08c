import numpy as np
import pytest
import sklearn.datasets

from crevnet.data import DigitImages, digits, load_digits


def test_embedded_splits_partition_the_bundled_set():
    bundled = sklearn.datasets.load_digits()
    train, test = load_digits(None, "train"), load_digits(None, "test")
    assert len(train) + len(test) == len(bundled.images) == 1797
    assert abs(len(test) / 1797 - 0.2) < 0.005
    images = np.concatenate([train.images, test.images])
    expected = {tuple(int(v * 255 / 16 + 0.5) for v in image.flat) for image in bundled.images}
    assert {tuple(image.flatten().tolist()) for image in images} == expected
    assert (images.min(), images.max()) == (0, 255)


def test_embedded_splits_share_no_image_and_are_stratified():
    train, test = load_digits(None, "train"), load_digits(None, "test")
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    for label in range(10):
        in_train, in_test = (int((part.labels == label).sum()) for part in (train, test))
        assert abs(in_test - 0.2 * (in_train + in_test)) <= 1


def test_embedded_images_keep_their_labels():
    bundled = sklearn.datasets.load_digits()
    label_of = dict(zip((i.tobytes() for i in bundled.images.astype(np.uint8)), bundled.target, strict=True))
    for split in ("train", "test"):
        part = load_digits(None, split)
        for image, label in zip(part.images, part.labels, strict=True):
            assert label_of[np.rint(image * (16 / 255)).astype(np.uint8).tobytes()] == label


def test_repeated_calls_agree():
    first, second = load_digits(None, "test"), load_digits(None, "test")
    assert (first.images == second.images).all()
    assert first.name == second.name == "embedded digits test"


def test_root_means_mnist(monkeypatch, tmp_path):
    asked = []
    found = DigitImages(np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.uint8), "stub")
    monkeypatch.setattr(digits, "load_mnist", lambda *args: asked.append(args) or found)
    assert load_digits(tmp_path, "test", download=True) is found
    assert asked == [(tmp_path, "test", True)]


@pytest.mark.parametrize("with_root", [True, False])
def test_unknown_split(tmp_path, with_root):
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'validation'"):
        load_digits(tmp_path if with_root else None, "validation")


def test_download_without_root():
    with pytest.raises(ValueError, match="download=True needs root"):
        load_digits(None, "train", download=True)
