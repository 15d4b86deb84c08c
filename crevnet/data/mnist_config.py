"""Configuration of Moving MNIST, which builds the three sets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crevnet.data.config import HELD_OUT, TRAIN_SIZE, DataConfig
from crevnet.data.digit_images import DigitImages
from crevnet.data.digits import load_digits
from crevnet.data.moving_mnist import MovingMNIST, check_motion
from crevnet.data.splitting import hold_out

FIXED_SEED = 2015
"""Seed of the validation and test sequences: runs with different seeds are measured on the same ones."""

_TRAIN_STREAM, _VALIDATION_STREAM, _TEST_STREAM = range(3)


@dataclass(kw_only=True)
class MovingMNISTConfig(DataConfig):
    """Which digits move, and how; builds the training, validation and test sets.

    The three sets are made of different digits: the test set of the test split, the validation set of the
    last 10% of every label of the training split, the training set of the rest.

    Raises:
        ValueError: a value is out of range.
    """

    name: Literal["moving-mnist"] = "moving-mnist"
    """Which data set this is."""
    root: Path | None = None
    """Folder with the MNIST files; None for the small digits embedded in scikit-learn."""
    download: bool = False
    """Fetch missing MNIST files into `root`."""
    num_digits: int = 2
    """Digits per sequence."""
    image_size: int = 64
    """Height and width of a frame, pixels."""
    digit_size: int = 28
    """Height and width of a digit, pixels; other sizes are resized to it."""
    speed: tuple[float, float] | None = None
    """Lowest and highest speed, pixels per frame, between which that of each digit is drawn; None for a tenth of what
    `image_size` has beyond `digit_size`, 3.6 for 28 in 64.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_motion(self.num_digits, self.image_size, self.digit_size, self.speed, "data.")
        if self.download and self.root is None:
            raise ValueError("data.download needs data.root, the folder to download MNIST into")

    def frame_channels(self) -> int:
        """As in `DataConfig`."""
        return 1

    def source(self) -> str:
        """As in `DataConfig`."""
        return "MNIST" if self.root else "digits embedded in scikit-learn"

    def test_source(self) -> str:
        """As in `DataConfig`."""
        return "Test digits never seen in training"

    def build_train(self) -> MovingMNIST:
        """As in `DataConfig`."""
        digits, _ = self._training_digits()
        return self._build(digits, TRAIN_SIZE, self.seed, _TRAIN_STREAM)

    def build_validation(self, size: int) -> MovingMNIST:
        """As in `DataConfig`; shows no test digit."""
        _, digits = self._training_digits()
        return self._build(digits, size, FIXED_SEED, _VALIDATION_STREAM)

    def build_test(self, frames: int | None = None) -> MovingMNIST:
        """As in `DataConfig`, of test digits."""
        digits = load_digits(self.root, "test", self.download)
        return self._build(digits, self.test_sequences, FIXED_SEED, _TEST_STREAM, frames)

    def _training_digits(self) -> tuple[DigitImages, DigitImages]:
        digits = load_digits(self.root, "train", self.download)
        return hold_out(digits, HELD_OUT, (digits.name, f"{digits.name}, held out"))

    def _build(self, digits: DigitImages, size: int, seed: int, stream: int, frames: int | None = None) -> MovingMNIST:
        return MovingMNIST(
            digits,
            num_digits=self.num_digits,
            image_size=self.image_size,
            digit_size=self.digit_size,
            frames=self.frames if frames is None else frames,
            speed=self.speed,
            seed=seed,
            stream=stream,
            size=size,
        )
