"""The digits to move: MNIST, or the small set that scikit-learn carries."""

from pathlib import Path

import numpy as np

from crevnet.data.digit_images import DigitImages
from crevnet.data.mnist import Split, load_mnist
from crevnet.data.splitting import hold_out

TEST_FRACTION = 0.2
"""Part of every label of the embedded digits that makes up their test split."""


def load_digits(root: str | Path | None, split: Split, download: bool = False) -> DigitImages:
    """Load the digits of one split.

    Args:
        root: folder with the MNIST files (see `load_mnist`), or None for the digits embedded in scikit-learn,
            which need neither files nor a network: 1,797 images of 8x8 from the UCI set "Optical Recognition
            of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998), rescaled from 0..16 to 0..255. They have no
            published split; here the last 20% of every label are the test split.
        split: "train" or "test"; the two share no image.
        download: fetch missing MNIST files into `root`.

    Returns:
        Images [N, 28, 28] (MNIST) or [N, 8, 8] (embedded), and labels [N].

    Raises:
        DataError: see `load_mnist`.
        ValueError: `split` is neither "train" nor "test", or `download` is set without a `root`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if root is not None:
        return load_mnist(root, split, download)
    if download:
        raise ValueError("download=True needs root, the folder to download MNIST into")
    # Slow to import, and not needed where root is given.
    from sklearn.datasets import load_digits as load_bundled

    bundled = load_bundled()
    images = np.rint(bundled.images * (255 / 16)).astype(np.uint8)
    digits = DigitImages(images, bundled.target.astype(np.uint8), "embedded digits")
    train, test = hold_out(digits, TEST_FRACTION, ("embedded digits train", "embedded digits test"))
    return train if split == "train" else test
