"""A labelled set of digit images."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class DigitImages:
    """A labelled set of digit images, the material that moving sequences are made of.

    Raises:
        ValueError: an array is not uint8 or has another shape than stated below.
    """

    images: np.ndarray
    """uint8 [N, H, W], 0 (background) to 255 (ink)."""
    labels: np.ndarray
    """uint8 [N], the digit that each image shows, 0 to 9."""
    name: str
    """Where the images come from, for logs and error messages."""

    def __post_init__(self) -> None:
        for field, array, dimensions in (("images", self.images, 3), ("labels", self.labels, 1)):
            if array.dtype != np.uint8 or array.ndim != dimensions:
                raise ValueError(
                    f"{field} of {self.name} must be uint8 with {dimensions} dimension(s), "
                    f"got {array.dtype} of shape {array.shape}"
                )
        if len(self.images) != len(self.labels):
            raise ValueError(f"{self.name}: {len(self.images)} images but {len(self.labels)} labels; pass one each")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray, name: str) -> "DigitImages":
        """Return the images and labels at `indices` (int64 [M]) as a set of its own."""
        return DigitImages(self.images[indices], self.labels[indices], name)
