"""What a coupling says of streams, messages and states that do not fit."""

import re

import pytest
import torch
from torch import nn

from revgrad import (
    AdditiveCoupling,
    AffineCoupling,
    ChainState,
    Coupling,
    GatedCoupling,
    Inverse,
    LayerCall,
    Residue,
    ReversibilityError,
    ReversibleSequential,
    StreamError,
    snap,
)
from tests.revgrad.test_coupling import Doubling, Fixed


def test_source_and_target_must_differ(make):
    with pytest.raises(StreamError, match="AdditiveCoupling: source and target are both stream 1"):
        AdditiveCoupling(make.net(4), 1, 1)


@pytest.mark.parametrize(("source", "target"), [(-1, 0), (0, -1), ((0, -1), 1)])
def test_streams_are_counted_from_the_front(make, source, target):
    with pytest.raises(
        StreamError, match=re.escape(f"streams are counted from 0, got source={source} and target={target}")
    ):
        AdditiveCoupling(make.net(4), source, target)


def test_stream_that_is_not_there(make):
    with pytest.raises(
        StreamError, match=r"layer 0 \(AdditiveCoupling\): couples stream 0 to stream 1, .* is one stream; put a Split"
    ):
        ReversibleSequential(AdditiveCoupling(make.net(4)))(torch.zeros(2, 4))
    with pytest.raises(StreamError, match=r"couples stream 0 to stream 2, but there are 2 streams, 0 to 1$"):
        ReversibleSequential(AdditiveCoupling(make.net(4), 0, 2))(*make.streams())


MISFITS = {
    "shape": (
        AdditiveCoupling,
        Fixed(torch.zeros(3, 5)),
        r"message of shape \(3, 5\), but the target stream 1 has shape \(3, 4\)",
    ),
    "broadcast": (
        AdditiveCoupling,
        Fixed(torch.zeros(3, 1)),
        r"message of shape \(3, 1\), but .* shape \(3, 4\); messages are not broadcast: return y.expand_as",
    ),
    "in one tensor": (
        AffineCoupling,
        Fixed(torch.zeros(3, 8)),
        r"needs a message of 2 tensor\(s\) from .* returned a tensor of shape \(3, 8\): cut it, y.chunk\(2, dim=1\)",
    ),
    "too many": (AdditiveCoupling, Fixed(*[torch.zeros(3, 4)] * 2), r"needs a message of 1 tensor\(s\)"),
    "too few": (GatedCoupling, Fixed(torch.zeros(3, 4)), r"needs a message of 2 tensor\(s\)"),
    "no tensor": (AdditiveCoupling, Fixed(None), r"needs a message of 1 tensor\(s\)"),
    "a number": (AffineCoupling, Fixed(torch.zeros(3, 4), 1.0), r"needs a message of 2 tensor\(s\)"),
}


@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "stored"])
@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.composes("Misuse", "a message of the wrong shape", "error, with the layer's name")
def test_message_that_does_not_fit_names_the_layer(make, mode, misfit):
    cls, transform, message = MISFITS[misfit]
    chain = ReversibleSequential(AdditiveCoupling(make.net(4), 1, 0), cls(transform), mode=mode, arithmetic="float")
    with pytest.raises(StreamError, match=rf"layer 1 \({cls.__name__}\): .*{message}"):
        chain(*make.streams())


@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "stored"])
def test_a_recurrent_transform_that_is_given_no_state_says_what_it_needs(make, mode):
    chain = ReversibleSequential(AdditiveCoupling(make.cell(4, 1)), mode=mode, arithmetic="float")
    with pytest.raises(TypeError) as caught:
        chain(*make.streams())
    assert any("also needs state" in note and "stateful=True" in note for note in caught.value.__notes__)
    with pytest.raises(RuntimeError) as caught:
        make.chain("additive", 1)(*make.streams(width=5))
    assert all("also needs" not in note for note in caught.value.__notes__)


def test_which_couplings_have_an_exact_form(make):
    forms = {kind: make.coupling(kind).has_exact_form() for kind in ("additive", "gated", "affine")}
    assert forms == {"additive": True, "gated": True, "affine": False}
    assert not Doubling(make.net(4)).has_exact_form()
    assert Inverse(make.coupling("gated")).has_exact_form()
    assert not Inverse(make.coupling("affine")).has_exact_form()


STATES = {
    "not a pair": Fixed(torch.zeros(3, 4)),
    "a list": Fixed(torch.zeros(3, 4), state=[torch.zeros(3, 4)]),
    "one more": Fixed(torch.zeros(3, 4), state=(torch.zeros(3, 4),) * 2),
    "one less": Fixed(torch.zeros(3, 4), state=()),
    "no tensor": Fixed(torch.zeros(3, 4), state=(None,)),
}


@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "stored"])
@pytest.mark.parametrize("misfit", STATES)
def test_state_that_does_not_fit_names_the_layer(make, mode, misfit):
    chain = ReversibleSequential(
        AdditiveCoupling(make.net(4), 1, 0), AdditiveCoupling(STATES[misfit], stateful=True), mode=mode
    )
    state = ChainState(((), (torch.zeros(3, 4),)))
    with pytest.raises(StreamError, match=r"layer 1 \(AdditiveCoupling\): .*(new_state|must return as many)"):
        chain(*make.streams(), states=state)


def test_affine_has_no_exact_form(make):
    with pytest.raises(StreamError, match=r"layer 0 \(AffineCoupling\) has no exact form; choose arithmetic='float'"):
        make.chain("affine", 2, arithmetic="exact")
    chain = make.chain("affine", 2)
    chain.arithmetic = "exact"
    with pytest.raises(StreamError, match=r"layer 0 \(AffineCoupling\) has no exact form; choose arithmetic='float'"):
        chain(*make.streams())


def test_inverse_of_a_gated_coupling_alone_cannot_be_exact(make):
    with pytest.raises(StreamError, match=r"undoes a layer that forgets .* choose arithmetic='float'"):
        ReversibleSequential(Inverse(make.coupling("gated")), arithmetic="exact")(*make.streams())
    sum(y.sum() for y in ReversibleSequential(Inverse(make.coupling("gated")))(*make.streams())).backward()  # in float


def test_gated_coupling_and_its_inverse_are_the_identity(make):
    layer = make.coupling("gated")
    x = make.streams()
    y = ReversibleSequential(layer, Inverse(layer))(*x)
    assert all(map(torch.equal, y, map(snap, x)))
    grads = torch.autograd.grad(y, x, (torch.zeros(3, 4), torch.ones(3, 4)))
    torch.testing.assert_close(grads[1], torch.ones(3, 4), rtol=1e-3, atol=1e-3)


@pytest.mark.composes("Misuse", "a transform that changes its input in place", "error: *changed its input in place*")
def test_transform_that_changes_its_input(make):
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    for mode in ("reversible", "stored"):
        chain = ReversibleSequential(AdditiveCoupling(make.net(4), 1, 0), AdditiveCoupling(InPlace()), mode=mode)
        with pytest.raises(
            StreamError, match=r"layer 1 \(AdditiveCoupling\): the transform changed its input in place"
        ):
            chain(*make.streams())


def test_coupling_without_formulas_says_so(make):
    with pytest.raises(TypeError, match=r"Coupling does not define merge\(target, \*message\)"):
        Coupling(make.net(4)).run(make.streams(), LayerCall())
    with pytest.raises(TypeError, match=r"Coupling does not define unmerge\(merged, \*message\)"):
        Coupling(make.net(4)).undo(make.streams(), LayerCall())
    with pytest.raises(StreamError, match="Doubling has no exact form"):
        Doubling(make.net(4)).run(make.streams(), LayerCall(residue=Residue()))


@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "stored"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["logits", "candidate"])
def test_message_that_is_not_finite_names_the_layer(make, which, bad, mode):
    """A diverged network must not become an index out of bounds or a silently finite stream."""
    a, h = torch.zeros(3, 4), torch.ones(3, 4)
    (a if which == "logits" else h)[1, 2] = bad
    chain = ReversibleSequential(make.coupling("gated", 4, 1), GatedCoupling(Fixed(a, h)), mode=mode)
    if which == "logits" and bad in (float("inf"), -float("inf")):
        chain(*make.streams())  # a gate of exactly 1 or 0 is a gate
        return
    with pytest.raises(ReversibilityError, match=r"layer 1 \(GatedCoupling\): the stream is not finite"):
        chain(*make.streams())


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.composes(
    "Conditioning", "a closure over a tensor with a gradient", "error: *the transform reads a tensor*"
)
def test_a_tensor_from_outside_raises_instead_of_losing_its_gradient(computed):
    outside = torch.ones(4, requires_grad=True)
    weight = outside.exp() if computed else outside

    class Closure(nn.Module):
        def forward(self, x):
            return x * weight

    chain = ReversibleSequential(AdditiveCoupling(Closure()))
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(
        ReversibilityError, match=r"layer 0 \(AdditiveCoupling\): the transform reads a tensor of shape \(4,\)"
    ):
        chain(x, x)[1].sum().backward()
    chain.mode = "stored"
    chain(x, x)[1].sum().backward()
    assert outside.grad is not None


def test_a_function_is_no_transform():
    with pytest.raises(StreamError, match="AdditiveCoupling: the transform must be a module"):
        AdditiveCoupling(lambda x: x)
