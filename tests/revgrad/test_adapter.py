import pytest
import torch
from torch import nn

from revgrad.adapter import Adapter, takes


def module(forward):
    m = nn.Module()
    m.forward = forward
    return m


# How a transform is defined, and how many arguments it is given by position.
CASES = {
    "by either": (lambda x, mask: 0, 1),
    "both by position": (lambda x, mask: 0, 2),
    "by name only": (lambda x, *, mask=None: 0, 1),
    "by position only": (lambda x, y, /, mask=None: 0, 2),
    "any number": (lambda *xs, mask=None: 0, 3),
    "any name": (lambda x, **more: 0, 1),
    "any name behind one by position only": (lambda x, /, **more: 0, 1),
    "anything": (lambda *xs, **more: 0, 2),
    "nothing": (lambda x: 0, 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["x", "y", "xs", "mask", "other"])
def test_takes_what_a_call_takes(case, name):
    forward, positional = CASES[case]
    try:
        forward(*range(positional), **{name: 1})
        works = True
    except TypeError as error:
        works = "missing" in str(error)
    assert takes(module(forward), name, positional) == works
    assert takes(Adapter(Adapter(module(forward))), name, positional) == works


def test_a_compiled_transform_takes_what_the_module_takes():
    class Told(nn.Module):
        def forward(self, x, scale=1.0):
            return scale * x

    compiled = torch.compile(Told(), backend="eager")
    assert takes(compiled, "scale", 1)
    assert not takes(compiled, "mask", 1)
