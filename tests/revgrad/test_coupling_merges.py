"""Couplings with a merge of one's own: its parameters, what it inherits, and what it must not do."""

import pytest
import torch
from torch import nn

from revgrad import AdditiveCoupling, Coupling, Inverse, ReversibilityError, ReversibleSequential, StreamError


class Learned(Coupling):
    """A merge with a parameter of its own, and a log-determinant that depends on it."""

    def __init__(self, transform, source=0, target=1):
        super().__init__(transform, source, target)
        self.gain = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def merge(self, target, *message):
        return target * self.gain + self.gain**2 * message[0]

    def unmerge(self, merged, *message):
        return (merged - self.gain**2 * message[0]) / self.gain

    def log_derivative(self, target, *message):
        return self.gain.abs().log().expand_as(target)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("log_det", [False, True])
@pytest.mark.composes("Structure", "couplings whose merge has parameters of its own")
def test_parameters_that_a_merge_reads_have_their_gradients(make, inverted, log_det):
    layers = [Learned(nn.Linear(4, 4).double(), i % 2, 1 - i % 2) for i in range(3)]
    model = ReversibleSequential(*(Inverse(layer) if inverted else layer for layer in layers))
    found, given = [], make.streams(dtype=torch.float64)
    for model.mode in ("stored", "reversible"):
        model.zero_grad()
        x = [t.detach().requires_grad_() for t in given]
        out = model(*x, log_det=log_det)
        y, extra = (out[0], out[1].sum()) if log_det else (out, 0)
        (sum(t.square().sum() for t in y) + 3 * extra).backward()
        found.append([p.grad for p in model.parameters()] + [t.grad for t in x])
    for stored, reversible in zip(*found, strict=True):
        torch.testing.assert_close(reversible, stored, rtol=1e-9, atol=1e-9)


def test_a_tensor_that_a_merge_finds_elsewhere_raises(make):
    outside = torch.tensor(2.0, requires_grad=True)

    class Closed(Coupling):
        def merge(self, target, *message):
            return target + outside * message[0]

        def unmerge(self, merged, *message):
            return merged - outside * message[0]

    with pytest.raises(ReversibilityError, match=r"Closed: .* its gradient would be lost"):
        ReversibleSequential(Closed(nn.Linear(4, 4)))(*make.streams())[1].sum().backward()


class Halved(AdditiveCoupling):
    """Says another merge than the class it inherits from, and nothing else."""

    def merge(self, target, *message):
        return target + 0.5 * message[0]

    def unmerge(self, merged, *message):
        return merged - 0.5 * message[0]


class Twice(AdditiveCoupling):
    def merge(self, target, *message):
        return 2 * target + message[0]

    def unmerge(self, merged, *message):
        return (merged - message[0]) / 2


def test_what_belongs_to_another_merge_is_not_inherited(make, check):
    chain = ReversibleSequential(*(Halved(nn.Linear(4, 4), i % 2, 1 - i % 2) for i in range(2)))
    x = make.streams()
    stored, reversible = (check.gradients(chain, x, mode) for mode in ("stored", "reversible"))
    check.same(reversible, stored, rtol=1e-5, atol=1e-6)
    with pytest.raises(StreamError, match=r"layer 0 \(Halved\) has no exact form"):
        ReversibleSequential(Halved(nn.Linear(4, 4)), arithmetic="exact")(*make.streams())
    with pytest.raises(StreamError, match="Twice does not say what its log-determinant is"):
        ReversibleSequential(Twice(nn.Linear(4, 4)), arithmetic="float")(*make.streams(), log_det=True)
    assert AdditiveCoupling.merge_vjp is not Coupling.merge_vjp


@pytest.mark.parametrize("direction", ["merge", "unmerge"])
@pytest.mark.composes("Misuse", "a merge or an inverse that works in place", "error: *in place*")
def test_a_merge_in_place_raises_and_the_output_stays(make, direction):
    class InPlace(Coupling):
        def merge(self, target, *message):
            return target.add_(message[0]) if direction == "merge" else target + message[0]

        def unmerge(self, merged, *message):
            return merged.sub_(message[0])

    chain = ReversibleSequential(InPlace(nn.Linear(4, 4)))
    x = make.streams(requires_grad=False)
    if direction == "merge":
        with pytest.raises(StreamError, match="InPlace: merge and unmerge must not change what they are given"):
            chain(*x)
    else:
        y = chain(*x)
        with pytest.raises(StreamError, match="InPlace: merge and unmerge must not change what they are given"):
            y[1].sum().backward()
