import pytest
import torch

import revgrad


def test_errors_are_of_the_kinds_that_callers_catch(make):
    assert issubclass(revgrad.ReversibilityError, RuntimeError)
    assert issubclass(revgrad.StreamError, ValueError)
    with pytest.raises(ValueError, match="put a Split before it"):
        make.chain("additive", 1)(torch.zeros(1, 4))
    with pytest.raises(RuntimeError, match="is not finite"):
        make.chain("gated", 1)(torch.full((1, 4), torch.inf), torch.zeros(1, 4))
