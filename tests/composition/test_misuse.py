"""What would make a gradient wrong raises; where nothing is harmed, nothing does."""

import pytest
import torch
from torch import nn

from revgrad import AdditiveCoupling, ReversibleSequential

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.composes("Misuse", "an input modified in place after forward", "works: it is recovered from the output")
def test_input_modified_after_forward_does_no_harm(small, make, check):
    chain = small.chain().double()
    x = make.streams(dtype=torch.float64, requires_grad=False)
    chain.mode = "stored"
    expected = torch.autograd.grad(check.loss(chain(*x)), tuple(chain.parameters()))
    chain.mode = "reversible"
    loss = check.loss(chain(*x))
    x[0].zero_()
    for a, b in zip(torch.autograd.grad(loss, tuple(chain.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x):
        return self.linear(x) * self.shift


@pytest.mark.composes(
    "Misuse", "a buffer changed between forward and backward", "error: *modified by an inplace operation*"
)
def test_buffer_modified_before_backward(small, make, check):
    chain = small.of(Shift)
    loss = check.loss(chain(*make.streams()))
    chain[1].transform.shift.mul_(1.0001)  # too little to be seen in what is recovered
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.composes("Misuse", "a buffer replaced between forward and backward", "works: the one of the forward pass")
def test_buffer_replaced_before_backward(small, make, check):
    chain, x = small.of(Shift).double(), make.streams(dtype=torch.float64)
    expected = torch.autograd.grad(check.loss(chain(*x)), x)
    loss = check.loss(chain(*x))
    other = chain[1].transform.shift = torch.zeros(4, dtype=torch.float64)
    assert all(map(torch.equal, torch.autograd.grad(loss, x), expected))
    assert chain[1].transform.shift is other


@pytest.mark.composes(
    "Misuse",
    "statistics moved between a forward in eval mode and its backward",
    "error: *modified by an inplace operation*",
)
def test_statistics_moved_before_backward(small, make, check):
    chain, x = small.of(lambda: nn.BatchNorm1d(4)).eval(), make.streams()
    loss = check.loss(chain(*x))
    chain.train()(*x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", ["stored", "checkpoint", "reversible"])
@pytest.mark.composes(
    "Misuse", "a source stream of the wrong shape", "error: that of the transform, with the layer's name"
)
def test_source_stream_of_the_wrong_shape_names_the_layer(small, mode):
    chain = small.chain(mode=mode)
    with pytest.raises(RuntimeError, match=r"cannot be multiplied") as caught:
        chain(torch.zeros(3, 5), torch.zeros(3, 4))
    assert caught.value.__notes__ == ["layer 0 (AdditiveCoupling): in its transform, given stream 0 of shape (3, 5)"]


@pytest.mark.composes(
    "Misuse", "a closed-over tensor that requires a gradient only later", "error: *the transform reads a tensor*"
)
def test_closure_is_looked_at_in_every_backward_pass(make):
    outside = torch.ones(4)

    class Closure(nn.Module):
        def forward(self, x):
            return torch.tanh(x) * outside

    chain, x = ReversibleSequential(AdditiveCoupling(Closure())), make.streams()
    chain(*x)[1].sum().backward()
    outside.requires_grad_()
    with pytest.raises(RuntimeError, match=r"the transform reads a tensor of shape \(4,\).*pass it as an argument"):
        chain(*x)[1].sum().backward()
