import pytest
import torch

from revgrad.channelwise import Channelwise, per_channel
from revgrad.layer import LayerCall


def test_per_channel_lines_up_with_the_second_dimension():
    p = torch.arange(3.0)
    for shape in [(2, 3), (2, 3, 4), (2, 3, 4, 5)]:
        x = torch.zeros(shape, dtype=torch.float64)
        y = x + per_channel(p, x)
        assert y.dtype == torch.float64
        assert y.transpose(0, 1).flatten(1)[:, 0].tolist() == [0, 1, 2]


def test_layer_without_methods_says_what_is_missing():
    x = (torch.zeros(2, 3),)
    with pytest.raises(TypeError, match=r"does not define transformed\(x\)"):
        Channelwise(3).run(x, LayerCall())
    with pytest.raises(TypeError, match=r"does not define restored\(y\)"):
        Channelwise(3).undo(x, LayerCall())
    with pytest.raises(TypeError, match=r"does not define log_volume\(\)"):
        Channelwise(3).log_det(x, LayerCall())


def test_representation():
    assert repr(Channelwise(3, target=1)) == "Channelwise(3, target=1)"
