"""What the tests of all kernels share: dtypes with tolerances, odd shapes, layouts, and where Triton runs."""

import pytest
import torch
from revgrad_kernels.backend import HAS_TRITON, INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Triton's interpreter stands in for the compiler where there is no GPU."""

needs_triton = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="Triton has neither a GPU nor its interpreter here"
)

TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
}
"""Kernel against reference, which both compute in float32 or float64: rounding of the result, and of exp."""

SHAPES = [(1, 1), (3, 31), (2, 127, 3), (1, 3, 1, 1), (2, 3, 5, 7), (1, 1025, 1, 2), (2, 4, 3, 5, 2), (0, 3, 4, 4)]
LAYOUTS = ["contiguous", "channels_last", "strided"]
TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda t: f(t).sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
}


def arrange(x, layout):
    """The same values in another memory layout: channels-last where there is one, or with gaps between elements."""
    x = x.to(DEVICE)
    if layout == "channels_last" and x.ndim in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    return x


def assert_close(found, expected, **tolerance):
    """Of one dtype, shape and device, within the tolerance of the dtype; the indices that are not are printed."""
    assert (found.dtype, found.shape, found.device) == (expected.dtype, expected.shape, expected.device)
    torch.testing.assert_close(found, expected, **(tolerance or TOLERANCES[found.dtype]))


def assert_leaves_have_same_gradients(functions, leaves, grads):
    """All functions of the same leaves give the same outputs and pull the same gradients back."""
    results = []
    for function in functions:
        own = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in leaves]
        outputs = function(*own)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results.append((*outputs, *torch.autograd.grad(outputs, own, grads, allow_unused=True)))
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            assert_close(found, expected)
