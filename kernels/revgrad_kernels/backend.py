"""Which code computes an operator: a Triton kernel, or plain PyTorch.

`auto` is Triton for CUDA tensors and plain PyTorch for all others, and where functions are transformed (`torch.func`,
forward-mode differentiation). On a CPU the recurrent operators and pixel shuffle have code of their own besides their
reference (`recurrent_cpu`, `pixel_shuffle_cpu`), for sizes where it is faster. `REVGRAD_KERNELS` in the environment
changes what `auto` means. With
`TRITON_INTERPRET=1`, set before Python starts, Triton's interpreter runs the kernels on the CPU, slowly: for tests.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _Absent:
    """Stands in for Triton where kernels are written down: every attribute and every call is itself."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Absent":
        return self


triton: Any
tl: Any
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]

    HAS_TRITON = True
except ImportError:  # there are no wheels outside Linux
    triton = tl = _Absent()
    HAS_TRITON = False

Backend = Literal["auto", "triton", "reference"]

INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)
AUTO: str = os.environ.get("REVGRAD_KERNELS") or "auto"


class BackendError(RuntimeError):
    """The backend that was asked for cannot compute this."""


def uses_triton(backend: str, *tensors: Tensor, operator: str = "this operator") -> bool:
    """Whether Triton computes, as asked for in the call or else in the environment.

    Args:
        backend: `auto`, `triton` or `reference`.
        tensors: All inputs of the operator.
        operator: Its name, for errors.

    Raises:
        BackendError: Triton was asked for and cannot run here, or the tensors are on several devices.
        ValueError: No such backend.
    """
    wanted = AUTO if backend == "auto" else backend
    device = tensors[0].device
    for t in tensors:
        if t.device != device:
            found = ", ".join(sorted({str(t.device) for t in tensors}))
            raise BackendError(f"all tensors must be on one device, got {found}")
    if wanted == "auto":
        return HAS_TRITON and device.type == "cuda" and not transformed(*tensors)
    if wanted == "reference":
        return False
    if wanted != "triton":
        where = "REVGRAD_KERNELS" if backend == "auto" else "backend"
        raise ValueError(f"{where} must be one of {', '.join(get_args(Backend))}, got {wanted!r}")
    if not can_run(device):
        reason = "it needs a CUDA device" if HAS_TRITON else "it is not installed"
        raise BackendError(f"Triton cannot compute on {device}: {reason}; choose backend 'auto' or 'reference'")
    if transformed(*tensors):
        raise BackendError(
            f"{operator}: a Triton kernel has neither transforms of torch.func (grad, vmap, jvp) nor forward-mode "
            "derivatives: choose backend='reference'"
        )
    return True


def transformed(*tensors: Tensor) -> bool:
    """Whether `torch.func` is at work, or forward-mode differentiation on one of the tensors: an operator of our own
    would fail inside of them, or leave a derivative out without a word.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    level = forward_ad._current_level
    return level >= 0 and any(forward_ad.unpack_dual(t, level=level).tangent is not None for t in tensors)


def left_to_cpu(backend: str) -> bool:
    """Whether an operator may use its code for the CPU: nobody has chosen a backend or needs PyTorch's own graph."""
    return backend == AUTO == "auto" and not observed()


def observed() -> bool:
    """Whether a compiler, a transform of functions (`torch.func`) or forward-mode differentiation is at work, which
    need PyTorch's own operators.
    """
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def can_run(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of this device."""
    return HAS_TRITON and (device.type == "cuda" or (INTERPRETED and device.type == "cpu"))


def refuse_gradient(operator: Any, why: str = "for second derivatives choose backend='reference'") -> None:
    """Make the gradient of an operator, such as a backward one, an error that says what to do."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise BackendError(f"{operator._qualname} has no gradient: {why}")

    operator.register_autograd(backward)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_OPTIONAL = frozenset({"bias", "memory_bias", "added"})


def check_floats(operator: str, **tensors: Tensor | None) -> None:
    """Check the arguments of an operator that computes with floats, given by their name.

    Raises:
        TypeError: One is no tensor.
        ValueError: One has another dtype; names operator and argument.
    """
    for name, t in tensors.items():
        # What has no dtype is told apart afterwards: this runs in every call.
        if getattr(t, "dtype", None) not in _FLOATS and not (t is None and name in _OPTIONAL):
            if not isinstance(t, Tensor):
                raise TypeError(f"{operator}: {name} must be a tensor, not {type(t).__name__}")
            raise ValueError(f"{operator}: {name} must be float16, bfloat16, float32 or float64, not {t.dtype}")


def tl_dtype(*tensors: Tensor | None) -> Any:
    """The dtype that a kernel computes in: float64 if any input is, else float32. None is an input that is left out."""
    return tl.float64 if arithmetic_dtype(*tensors) == torch.float64 else tl.float32


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """As `arithmetic`, for the reference."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As `x.to(dtype)`, which alone takes longer than adding two small tensors even where it has nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)
