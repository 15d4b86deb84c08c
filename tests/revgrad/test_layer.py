import pytest
import torch
from torch import nn

from revgrad import AdditiveCoupling, Inverse, LayerCall, ReversibleLayer, ReversibleSequential, StreamError, Swap


class Shear(ReversibleLayer):
    """A layer of a user: three streams, a parameter, and only `run` and `undo`."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))
        self.runs, self.undos = [], []

    def run(self, streams, call):
        self.runs.append(1)
        a, b, c = streams
        return a, b + self.factor[0] * a.sin(), c * torch.exp(self.factor[1]) + a * b

    def undo(self, streams, call):
        self.undos.append(1)
        a, b, c = streams
        b = b - self.factor[0] * a.sin()
        return a, b, (c - a * b) * torch.exp(-self.factor[1])


class Memory(ReversibleLayer):
    """A stateful layer of a user that is not a coupling."""

    stateful = True

    def run(self, streams, call):
        (x,), (h,) = streams, call.state
        call.new_state = (torch.tanh(h) + 0.5,)
        return (x * (2 + torch.sin(h)),)

    def undo(self, streams, call):
        (x,), (h,) = streams, call.state
        call.new_state = (torch.tanh(h) + 0.5,)
        return (x / (2 + torch.sin(h)),)


def three():
    return tuple(torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))


@pytest.mark.parametrize("wrap", [lambda x: x, Inverse])
def test_run_and_undo_are_enough_for_gradients(check, wrap):
    chain, x = ReversibleSequential(wrap(Shear()), Swap(), wrap(Shear())), three()
    assert torch.autograd.gradcheck(chain, x)
    check.same(check.gradients(chain, x, "reversible"), check.gradients(chain, x, "stored"), rtol=1e-12)


def test_default_rewind_undoes_once_and_runs_once_more():
    layer = Shear()
    torch.stack(ReversibleSequential(layer)(*three())).sum().backward()
    assert (len(layer.runs), len(layer.undos)) == (2, 1)
    layer = Shear()
    torch.stack(ReversibleSequential(Inverse(layer))(*three())).sum().backward()
    assert (len(layer.runs), len(layer.undos)) == (1, 2)


def test_stateful_layer_of_a_user(check):
    from revgrad import ChainState

    chain = ReversibleSequential(Memory(), Swap(), Memory())
    x, h, k = (t.requires_grad_() for t in torch.randn(3, 2, 4, dtype=torch.float64))

    def call(x, h, k):
        y, new = chain(x, states=ChainState(((h,), (), (k,))))
        return y, *new.tensors()

    assert torch.autograd.gradcheck(call, (x, h.detach().requires_grad_(), k.detach().requires_grad_()))


def test_inverse_swaps_run_and_undo(make):
    layer = make.coupling("additive").double()
    x = make.streams(dtype=torch.float64, requires_grad=False)
    inverse = Inverse(layer)
    assert all(map(torch.equal, inverse.run(x, LayerCall()), layer.undo(x, LayerCall())))
    assert all(map(torch.equal, inverse.undo(x, LayerCall()), layer.run(x, LayerCall())))
    assert list(inverse.parameters()) == list(layer.parameters())
    assert inverse.updates() == layer.updates() == 1
    stateful = AdditiveCoupling(make.cell(4, 1), stateful=True, carries=1)
    assert Inverse(stateful).stateful
    assert Inverse(stateful).carries == 1


def test_layer_without_methods_says_what_is_missing():
    class Nothing(ReversibleLayer):
        pass

    with pytest.raises(TypeError, match=r"Nothing does not define run\(streams, call\)"):
        ReversibleSequential(Nothing())(torch.zeros(1))
    with pytest.raises(TypeError, match=r"Nothing does not define undo\(streams, call\), its inverse"):
        ReversibleSequential(Inverse(Nothing()))(torch.zeros(1))
    assert Nothing().updates() is None
    assert repr(Nothing()) == "Nothing()"


@pytest.mark.parametrize("layer", [Swap(), AdditiveCoupling(nn.Linear(3, 3)), Inverse(Swap()), Shear()])
def test_a_layer_is_not_called_by_itself(layer):
    name = type(layer).__name__
    with pytest.raises(StreamError, match=rf"{name}: .*put it into a chain, ReversibleSequential\({name}\(...\)\)"):
        layer(*three())


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), (Swap(), Swap())])
def test_inverse_of_what_is_no_layer(wrong):
    with pytest.raises(StreamError, match=f"a {type(wrong).__name__} is not a reversible layer"):
        Inverse(wrong)


def test_an_undo_in_place_raises():
    class Doubling(ReversibleLayer):
        def run(self, streams, call):
            return tuple(2 * x for x in streams)

        def undo(self, streams, call):
            return tuple(x.div_(2) for x in streams)

    y = ReversibleSequential(Doubling())(torch.ones(2, requires_grad=True))
    with pytest.raises(StreamError, match="its inverse changed what it was given in place"):
        y.sum().backward()
