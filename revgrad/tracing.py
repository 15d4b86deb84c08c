"""Where the engine stands beside the rest of PyTorch: compilation, export, `torch.func`, sharding, CUDA graphs."""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from revgrad_kernels.backend import observed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from revgrad.errors import ReversibilityError

P = ParamSpec("P")
R = TypeVar("R")


def records_graph() -> bool:
    """Whether autograd records what is run: in inference mode it does not, whatever `torch.enable_grad` says there."""
    # The compiler cannot ask for inference mode.
    return torch.is_grad_enabled() and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled())


def recomputing() -> bool:
    """Whether a backward pass will come that can recompute.

    Without gradients none comes. `torch.func`, forward-mode derivatives and `torch.export` have none of their own:
    they differentiate, batch or write down what is run, so it is run as in stored mode.
    """
    return (
        records_graph()
        and not _transforming()
        and torch.autograd.forward_ad._current_level < 0
        and not torch.compiler.is_exporting()
    )


def _transforming() -> bool:
    """Whether `torch.func` is at work."""
    return torch._C._are_functorch_transforms_active()


# What torch.compiler.assume_constant_result sets, but that imports the compiler, which else makes a graph of the call.
_transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_values(tensors: Iterable[Tensor]) -> bool:
    """Whether there are numbers to look at: not where tensors are traced, batched, fake or on the meta device."""
    return not (observed() or any(isinstance(x, FakeTensor) or x.is_meta for x in tensors))


def check_surroundings(modules: Iterable[nn.Module], device: torch.device, *, may_wait: bool = True) -> None:
    """Raise where a backward pass that recomputes would not work.

    Args:
        modules: Those of the chain.
        device: Where it runs.
        may_wait: Whether the host may wait for the device.

    Raises:
        ReversibilityError: A module inside is sharded by itself: FSDP gathers its weights when it is called, and waits
            for gradients that accumulate in them. A CUDA graph is being captured, and the backward pass compares at
            once what it has recovered, for which the host waits.
    """
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    inside = next((m for m in modules if isinstance(m, sharded)), None) if sharded is not None else None
    if inside is not None:
        raise ReversibilityError(
            f"a {type(inside).__name__} inside the sequence is sharded by itself: call fully_shard on the sequence as "
            "a whole, or on several shorter sequences to gather fewer weights at a time"
        )
    if may_wait and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ReversibilityError(
            "a CUDA graph cannot capture a backward pass that checks at once what it has recovered: defer its checks, "
            "with DeferredChecks(), or choose mode='stored'"
        )


def refuse_inference_mode() -> None:
    """Raise where a backward pass could not differentiate what it computes again.

    Raises:
        ReversibilityError: It runs in `torch.inference_mode`, where nothing has a graph.
    """
    if torch.is_inference_mode_enabled():
        raise ReversibilityError(
            "a backward pass that recomputes records a graph, which torch.inference_mode() does not allow: call "
            "backward outside of it"
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


_REASON = (
    "revgrad recomputes in its own backward pass: compile the transforms inside, or choose mode='stored' and "
    "arithmetic='float'"
)
