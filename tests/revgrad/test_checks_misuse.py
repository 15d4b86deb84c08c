import pytest
from torch import nn

from revgrad import DeferredChecks, ReversibilityError, StreamError
from revgrad.checks import AT_ONCE, current_checks
from tests.revgrad.test_checks import measured

pytestmark = pytest.mark.usefixtures("single_thread")


def test_nothing_was_measured(make):
    with pytest.raises(ReversibilityError, match="has to be measured before"), DeferredChecks():
        pass
    assert current_checks() is AT_ONCE
    chain, x = make.chain("gated", 2), make.streams()
    checks = measured(lambda: chain(*x))
    with checks, pytest.raises(ReversibilityError, match="nothing is known of how much reservoirs of 20 elements"):
        chain(*make.streams(5))


def test_measuring_that_fails_leaves_things_as_they_were(make):
    checks = DeferredChecks()
    with pytest.raises(ZeroDivisionError), checks.measuring():
        raise ZeroDivisionError
    assert current_checks() is AT_ONCE
    with pytest.raises(ReversibilityError, match="has to be measured before"):
        checks.__enter__()


def test_random_numbers_are_refused_when_measuring(make):
    chain, x = make.chain("gated", 3, inner=lambda: nn.Dropout(0.5)), make.streams()
    checks = DeferredChecks()
    refused = pytest.raises(ReversibilityError, match=r"layer 0 \(GatedCoupling\): the transform draws random numbers")
    with refused, checks.measuring():
        chain(*x)
    chain.eval()
    with checks.measuring():
        chain(*x)
    with checks:
        chain(*x)
    checks.raise_if_failed()


def test_offloading_is_refused(make):
    chain, x = make.chain("gated", 2, offload=True), make.streams()
    checks = measured(lambda: chain(*x))
    with checks, pytest.raises(ReversibilityError, match="offload=True waits for copies to the host"):
        chain(*x)


def test_a_margin_below_one():
    with pytest.raises(StreamError, match="margin must be at least 1"):
        DeferredChecks(margin=0.5)
