"""When a backward pass can recompute. What comes of it is in tests/composition."""

import subprocess
import sys

import pytest
import torch

from revgrad import ReversibilityError
from revgrad.tracing import check_surroundings, recomputing, untraced


def test_recomputing_needs_gradients_and_no_other_transformation():
    assert recomputing()
    with torch.no_grad():
        assert not recomputing()
    with torch.inference_mode():
        assert not recomputing()
        with torch.enable_grad():
            assert not recomputing()
    with torch.autograd.forward_ad.dual_level():
        assert not recomputing()
    seen = []
    torch.func.grad(lambda x: seen.append(recomputing()) or x)(torch.ones(()))
    torch.func.vmap(lambda x: seen.append(recomputing()) or x)(torch.ones(2))
    assert seen == [False, False]
    assert recomputing()


def test_untraced_function_is_the_function():
    calls = []

    @untraced
    def double(x, *, plus=0):
        """Twice."""
        calls.append(x)
        return 2 * x + plus

    assert double(3, plus=1) == 7
    assert double.__doc__ == "Twice."
    assert calls == [3]


def test_the_compiler_is_not_imported_by_a_step():
    """It takes seconds, and only torch.compile needs it."""
    step = """
import sys, torch
from torch import nn
from revgrad import AdditiveCoupling, ReversibleSequential
x = torch.ones(2, 3, requires_grad=True)
ReversibleSequential(AdditiveCoupling(nn.Linear(3, 3)))(x, x)[1].sum().backward()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", step], check=True, timeout=300)


def test_ordinary_modules_are_let_through():
    check_surroundings([torch.nn.Linear(2, 2)], torch.device("cpu"))


@pytest.mark.composes("Autograd", "backward inside torch.inference_mode()", "error: *call backward outside of it*")
def test_backward_in_inference_mode_raises_instead_of_giving_no_gradients(make):
    loss = make.chain("additive", 2)(*make.streams())[1].sum()
    with torch.inference_mode(), pytest.raises(ReversibilityError, match="call backward outside"):
        loss.backward()
