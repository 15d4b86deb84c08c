import pytest
import torch
from torch import nn

from revgrad.hints import not_given, wrong_number, wrong_shape

TARGET = torch.zeros(3, 4, 5)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ([torch.zeros(3, 8, 5)], "returned a tensor of shape (3, 8, 5): cut it, y.chunk(2, dim=1)"),
        ([torch.zeros(3, 4, 10)], "returned a tensor of shape (3, 4, 10): cut it, y.chunk(2, dim=2)"),
        ([torch.zeros(3, 4, 5)], "returned a tensor of shape (3, 4, 5)"),
        ([torch.zeros(3, 8)], "returned a tensor of shape (3, 8)"),
        ([[torch.zeros(3, 4, 5)]], "returned a list: make it a tuple"),
        ([None], "returned a NoneType"),
        ([torch.zeros(1), 2.0, None], "returned a tensor of shape (1,), a float, a NoneType"),
        ([], "returned an empty tuple"),
    ],
)
def test_wrong_number(message, text):
    assert wrong_number(message, 2, TARGET) == text


@pytest.mark.parametrize(
    ("shape", "hint"), [((3, 1, 5), True), ((4, 1), True), ((), True), ((3, 2, 5), False), ((2, 3, 4, 5), False)]
)
def test_messages_that_would_be_broadcast(shape, hint):
    assert ("expand_as" in wrong_shape(torch.zeros(shape), TARGET)) == hint


class Cell(nn.Module):
    def forward(self, x, h, *, scale, context=None):
        return x


def test_what_a_transform_lacks():
    text = not_given(Cell(), 1, (), stateful=False)
    assert text == "; it also needs h, scale: chain(x, h=...), or stateful=True for a recurrent state"
    assert not_given(Cell(), 1, ["scale", "h"], stateful=False) == ""
    assert "needs h: " in not_given(Cell(), 1, ["scale"], stateful=False)
    assert "stateful" not in not_given(Cell(), 2, (), stateful=True)
    assert "stateful" not in not_given(Cell(), 2, (), stateful=False)
    assert "stateful" not in not_given(Cell(), 1, ["h"], stateful=False)
    assert not_given(nn.Linear(2, 2), 1, (), stateful=False) == ""
