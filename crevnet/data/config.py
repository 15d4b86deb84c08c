"""What the configurations of all data sets have in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from crevnet.data.sequence_set import SequenceSet
from crevnet.frame_size import FrameSize, height_width

HELD_OUT = 0.1
"""Part of the training data that is kept for validation."""

TRAIN_SIZE = 2**40
"""Training sequences: in effect without end, since they are made on the fly."""


@dataclass(kw_only=True)
class DataConfig(ABC):
    """Names a data set and builds its training, validation and test sequences.

    Raises:
        ValueError: a value is out of range.
    """

    name: str = ""
    """Which data set this is."""
    image_size: FrameSize = 64
    """Height and width of a frame in pixels, such as `[128, 160]`; one number where they are equal."""
    frames: int = 20
    """Frames per sequence, those given and those to predict together."""
    test_sequences: int = 5000
    """Sequences in the fixed test set."""
    seed: int = 0
    """Seed of the training sequences; validation and test sequences do not depend on it."""

    def __post_init__(self) -> None:
        for name in ("frames", "test_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if min(height_width(self.image_size)) < 1:
            raise ValueError(f"data.image_size must be at least 1, got {self.image_size}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"data.seed must be 0 to 2**64 - 1, got {self.seed}")

    @abstractmethod
    def frame_channels(self) -> int:
        """Channels of a frame."""

    @abstractmethod
    def source(self) -> str:
        """Where the sequences come from, in a few words."""

    @abstractmethod
    def test_source(self) -> str:
        """What is tested on, for the head of a table."""

    @abstractmethod
    def build_train(self) -> SequenceSet:
        """Build the training set, in effect without end.

        Raises:
            DataError: files are missing or damaged.
        """

    @abstractmethod
    def build_validation(self, size: int) -> SequenceSet:
        """Build the fixed set of at most `size` sequences to validate on during training.

        Raises:
            DataError: files are missing or damaged.
            ValueError: `size` is below 1.
        """

    @abstractmethod
    def build_test(self, frames: int | None = None) -> SequenceSet:
        """Build the fixed test set of at most `test_sequences` sequences.

        Args:
            frames: frames per sequence, if other than in training; what is held out of the training data is the same.

        Raises:
            DataError: files are missing or damaged.
            ValueError: `frames` is below 1.
        """

    def thinning(self) -> int:
        """Of so many frames of a video one is kept, where the model is tested or used."""
        return 1
