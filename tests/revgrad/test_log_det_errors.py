"""Layers that do not say what their log-determinant is, or say it wrongly."""

import pytest
import torch

from revgrad import (
    Concatenate,
    Coupling,
    Inverse,
    Permute,
    ReversibilityError,
    ReversibleLayer,
    ReversibleSequential,
    Split,
    StreamError,
    Swap,
    wrap,
)
from revgrad.log_det import zero_log_det
from tests.revgrad.test_log_det import MODES, LeakyReLU


class Doubling(Coupling):
    """A coupling that does not say what its derivative is."""

    def merge(self, target, *message):
        return 2 * target + message[0]

    def unmerge(self, merged, *message):
        return (merged - message[0]) / 2


class Negation(ReversibleLayer):
    """A layer that does not say what its log-determinant is, although it is zero."""

    def run(self, streams, call):
        return tuple(-x for x in streams)

    undo = run


SILENT = {
    "coupling": (lambda make: Doubling(make.net(4)), "Doubling does not say what its log-determinant is"),
    "layer": (lambda make: Negation(), r"layer 1 \(Negation\): Negation does not say what its log-determinant is"),
    "inverse": (lambda make: Inverse(Negation()), r"layer 1 \(Inverse\(Negation\)\): Negation does not say"),
    "wrapped": (
        lambda make: wrap(lambda *x: x, lambda *x: x),
        r"layer 1 \(Wrapped\): its log-determinant is not known: give wrap\(forward, inverse, log_det=...\)",
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SILENT)
@pytest.mark.composes(
    "Log-determinants",
    "a layer that does not say what its log-determinant is",
    "error: *does not say what its log-determinant is*",
)
def test_layer_that_does_not_say_raises_instead_of_giving_zero(make, mode, name):
    build, message = SILENT[name]
    chain, x = ReversibleSequential(Swap(), build(make), mode=mode), make.streams()
    chain(*x)[1].sum().backward()
    with pytest.raises(StreamError, match=message):
        chain(*x, log_det=True)


def test_rewind_of_a_user_that_ignores_the_gradient_raises():
    class Own(LeakyReLU):
        def rewind(self, backward, call, state_grads, wrt):
            log_det_grad, call.log_det_grad = call.log_det_grad, None
            back = super().rewind(backward, call, state_grads, wrt)
            call.log_det_grad = log_det_grad
            return back

    y, log_det = ReversibleSequential(Own())(torch.randn(2, 3, requires_grad=True), log_det=True)
    with pytest.raises(ReversibilityError, match=r"layer 0 \(Own\): its rewind does not take call.log_det_grad"):
        (y.sum() + log_det.sum()).backward()


def test_a_wrong_inverse_is_still_noticed():
    class Off(LeakyReLU):
        def undo(self, streams, call):
            return tuple(1.5 * x for x in super().undo(streams, call))

    y, log_det = ReversibleSequential(Off())(torch.randn(20, 3, requires_grad=True), log_det=True)
    with pytest.raises(ReversibilityError, match="the input recovered in the backward pass differs"):
        (y.sum() + log_det.sum()).backward()


def test_derivatives_are_element_by_element(make):
    """One that broadcasts would be counted once instead of for every element."""

    class Constant(Doubling):
        def log_derivative(self, target, *message):
            return torch.full((len(target), 1), 2.0).log()

    with pytest.raises(StreamError, match=r"Constant: log_derivative returned shape \(3, 1\), .* of shape \(3, 4\)"):
        ReversibleSequential(Constant(make.net(4)))(*make.streams(), log_det=True)


@pytest.mark.parametrize(
    ("layer", "count"), [(Split(dim=0), 1), (Permute([1, 0], dim=-2), 1), (Concatenate(dim=0), 2)], ids=str
)
@pytest.mark.composes(
    "Log-determinants", "values moved from sample to sample", "error: *moves values along the first dimension*"
)
def test_values_must_stay_in_their_sample(layer, count):
    x = torch.zeros(count, 2, 3).unbind()
    ReversibleSequential(layer)(*x)
    with pytest.raises(StreamError, match="moves values along the first dimension, which log_det takes for the"):
        ReversibleSequential(layer)(*x, log_det=True)


def test_log_determinant_of_another_shape():
    chain = ReversibleSequential(wrap(torch.neg, torch.neg, lambda x: x.sum()))
    with pytest.raises(StreamError, match=r"layer 0 \(Wrapped\): its log-determinant has shape \(\), .* each of the 3"):
        chain(torch.zeros(3, 2), log_det=True)


def test_streams_must_have_the_samples_first():
    assert zero_log_det((torch.zeros(3, 2), torch.zeros(3))).shape == (3,)
    assert (
        zero_log_det((torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.float64))).dtype == torch.float64
    )
    assert zero_log_det((torch.zeros(3, dtype=torch.bfloat16),)).dtype == torch.float32
    for streams in [(torch.zeros(3, 2), torch.zeros(2, 3)), (torch.zeros(()),)]:
        with pytest.raises(StreamError, match="the first dimension of all streams must be that of the samples"):
            zero_log_det(streams)
