"""What would make a gradient wrong raises; where nothing is harmed, nothing does."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from revgrad import AdditiveCoupling, ReversibilityError, ReversibleSequential, wrap

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


class Stashing(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.how = how
        self.aux = [] if how == "list" else {} if how == "dict" else None

    def forward(self, x):
        y = self.inner(x)
        loss = y.square().mean()
        if self.how == "list":
            self.aux.append(loss)
        elif self.how == "dict":
            self.aux["loss"] = loss
        else:
            self.aux = {
                "tensor": loss,
                "tuple": (loss, 1),
                "nested": {"losses": [{"balance": loss}]},
                "namespace": SimpleNamespace(losses=(loss,)),
                "detached": loss.detach(),
            }[self.how]
        return y


@pytest.mark.composes("Misuse", "a loss put aside in an attribute of a transform", "error: *keeps a tensor*")
@pytest.mark.parametrize("how", ["tensor", "tuple", "list", "dict", "nested", "namespace"])
def test_side_loss_is_not_lost_in_silence(make, how):
    chain = ReversibleSequential(AdditiveCoupling(Stashing(how)), AdditiveCoupling(make.net(4), source=1, target=0))
    outputs = chain(*make.streams())
    with pytest.raises(ReversibilityError, match=r"Stashing keeps a tensor of shape \(\) .* 'aux'.*x.detach"):
        sum(y.sum() for y in outputs).backward()


@pytest.mark.parametrize("how", ["hook", "parent"])
def test_side_loss_on_a_module_of_pytorch(make, how):
    """Such modules keep nothing by themselves, but others may put something there, also before training."""

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            if how == "hook":
                self.inner.register_forward_hook(lambda module, x, y: setattr(module, "aux", y.square().mean()))

        def forward(self, x):
            y = self.inner(x)
            if how == "parent":
                self.inner.aux = y.square().mean()
            return y

    chain = ReversibleSequential(AdditiveCoupling(Parent()))
    with torch.no_grad():
        chain(*make.streams())
    for _ in range(2):
        outputs = chain(*make.streams())
        with pytest.raises(ReversibilityError, match=r"Linear keeps a tensor of shape \(\) .* 'aux'.*x.detach"):
            sum(y.sum() for y in outputs).backward()


def test_detached_tensors_and_old_graphs_may_be_kept(make, check):
    chain = ReversibleSequential(AdditiveCoupling(Stashing("detached")))
    chain[0].transform.history = [torch.ones(2, requires_grad=True) * 2]
    chain[0].transform.history.append(chain[0].transform.history)
    chain(*make.streams())[1].sum().backward()


@pytest.mark.composes("Misuse", "a closure over a tensor with a gradient, where nothing else has one", "works")
@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "stored"])
def test_closure_where_nothing_else_requires_a_gradient(make, mode):
    weight = torch.randn(4, 4, requires_grad=True)
    chain = ReversibleSequential(wrap(lambda x: x @ weight, lambda y: y @ weight.inverse()), mode=mode)
    head, x = nn.Linear(4, 1), torch.randn(3, 4)
    found = torch.autograd.grad(head(chain(x)).sum(), weight)[0]
    torch.testing.assert_close(found, torch.autograd.grad(head(x @ weight).sum(), weight)[0])
