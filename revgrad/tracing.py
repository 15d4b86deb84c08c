"""Where the engine stands beside the other transformations of PyTorch: compilation, export, `torch.func`."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def recomputing() -> bool:
    """Whether a backward pass will come that can recompute.

    Without gradients none comes. `torch.func`, forward-mode derivatives and `torch.export` have none of their own:
    they differentiate, batch or write down what is run, so it is run as in stored mode.
    """
    return (
        torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and not torch.compiler.is_exporting()
    )


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compile` leaves this function to Python. Its compiler is imported only by those who use it, since that
    takes seconds.
    """
    hidden: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not hidden:
            hidden.append(torch.compiler.disable(function, reason=_REASON))
        return hidden[0](*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = _REASON  # type: ignore[attr-defined]
    return call


_REASON = "revgrad recomputes in its own backward pass: compile the transforms inside, or choose mode='stored'"
