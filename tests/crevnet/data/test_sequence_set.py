import pytest
import torch

from crevnet.data import SequenceSet


class Counting(SequenceSet):
    size, frames = 5, 2

    def batch(self, indices):
        return torch.from_numpy(self.checked(indices)).float().view(-1, 1, 1, 1, 1).expand(-1, self.frames, 1, 3, 3)


def test_single_sequences_and_lists_of_them_are_parts_of_batches():
    counting = Counting()
    assert len(counting) == 5
    assert torch.equal(counting[3], counting.batch([3])[0])
    assert [float(x.mean()) for x in counting.__getitems__([4, 0, 4])] == [4, 0, 4]


@pytest.mark.parametrize("indices", [[5], [-1], [0.5], [[1]], [True]])
def test_indices_are_checked(indices):
    with pytest.raises(IndexError, match=r"is not in 0\.\.4|flat list of integers"):
        Counting().batch(indices)


def test_batch_must_be_defined():
    with pytest.raises(TypeError, match="abstract method batch"):
        SequenceSet()
