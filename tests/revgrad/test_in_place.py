import pytest
import torch
from torch import nn

from revgrad import StreamError
from revgrad.in_place import Unchanged


def test_a_change_in_place_is_seen():
    x = torch.ones(3)

    def error(found):
        return StreamError(f"changed: {tuple(found.shape)}")

    with Unchanged([x], error):
        x + 1
    with pytest.raises(StreamError, match=r"changed: \(3,\)"), Unchanged([x], error):
        x.add_(1)
    with torch.inference_mode():
        y = torch.ones(3)
    with Unchanged([y], error):
        pass


def test_a_change_of_the_output_of_a_chain_is_explained(make):
    chain, x = make.chain("additive", 2), make.streams()
    y, _ = chain(*x)
    nn.ReLU(inplace=True)(y).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        y.sum().backward()
    assert any("ReLU(inplace=True); make that out of place" in note for note in caught.value.__notes__)
