"""What all data sets here are: numbered sequences of frames, taken in batches."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

Indices = Sequence[int] | np.ndarray | Tensor


class SequenceSet(Dataset[Tensor], ABC):
    """Sequences of frames. Subclasses define `batch`.

    Attributes:
        size: Number of sequences.
        frames: Frames per sequence.
    """

    size: int
    frames: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        """Return sequence `index` as float32 [T, C, H, W] in [0, 1].

        Raises:
            IndexError: see `batch`.
        """
        return self.batch([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """Return one `__getitem__` tensor for each index; DataLoader calls this instead of looping.

        Raises:
            IndexError: see `batch`.
        """
        return list(self.batch(indices).unbind(0))

    @abstractmethod
    def batch(self, indices: Indices) -> Tensor:
        """Return the sequences at `indices`, all at once.

        Args:
            indices: B integers, in any order, repeats allowed.

        Returns:
            float32 [B, T, C, H, W] in [0, 1].

        Raises:
            IndexError: an index is not an integer in 0..size - 1 (negative ones do not count from the end).
        """

    def checked(self, indices: Indices) -> np.ndarray:
        """The indices as int64 [B].

        Raises:
            IndexError: see `batch`.
        """
        index_B = np.asarray(indices)
        if index_B.size == 0:
            return np.empty(0, np.int64)
        if index_B.ndim != 1 or index_B.dtype.kind not in "iu":
            raise IndexError(f"indices must be a flat list of integers, got {index_B.dtype} {index_B.shape}")
        lowest, highest = int(index_B.min()), int(index_B.max())
        if lowest < 0 or highest >= self.size:
            raise IndexError(f"index {lowest if lowest < 0 else highest} is not in 0..{self.size - 1}")
        return index_B.astype(np.int64)
