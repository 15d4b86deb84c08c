import pytest
from torch import nn

from revgrad import StreamError, set_mode


def test_the_mode_of_all_chains_inside_a_model(make):
    model = nn.ModuleDict({"a": make.chain("additive", 2), "b": nn.Sequential(make.chain("additive", 2))})
    set_mode(model, "stored")
    assert [model["a"].mode, model["b"][0].mode] == ["stored", "stored"]
    with pytest.raises(StreamError, match="there is no chain inside the Linear"):
        set_mode(nn.Linear(1, 1), "stored")
    with pytest.raises(StreamError, match="mode"):
        set_mode(model, "kept")
