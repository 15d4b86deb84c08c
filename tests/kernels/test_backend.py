import os
import re
import subprocess
import sys
from functools import partial

import pytest
import revgrad_kernels as kernels
import torch
from revgrad_kernels import backend, weighted_sum
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from tests.kernels.cases import DEVICE, TRANSFORMS, needs_triton

CPU, META = torch.zeros(2), torch.zeros(2, device="meta")


def test_auto_is_the_reference_away_from_cuda():
    assert not backend.uses_triton("auto", CPU)
    assert not backend.uses_triton("auto", META)
    assert not backend.uses_triton("reference", CPU)


@needs_triton
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_functions_take_the_reference(transform):
    with FakeTensorMode():
        gpu = torch.empty(2, device="cuda")
    decided = []
    transform(lambda t: (decided.append(backend.uses_triton("auto", gpu)), t * t)[1], CPU)
    assert decided == [False]
    assert backend.uses_triton("auto", gpu)
    with pytest.raises(
        backend.BackendError, match=r"weighted_sum: .* neither .* torch\.func .* choose backend='reference'"
    ):
        transform(lambda t: weighted_sum(t, t, t, backend="triton"), torch.zeros(2, 3, device=DEVICE))


@needs_triton
def test_forward_mode_takes_the_reference_for_tensors_with_a_tangent():
    with FakeTensorMode(), forward_ad.dual_level():
        gpu, integers = torch.empty(2, device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")
        assert backend.uses_triton("auto", gpu, integers)
        assert not backend.uses_triton("auto", integers, forward_ad.make_dual(gpu, gpu))
    x = torch.zeros(2, 3, device=DEVICE)
    with forward_ad.dual_level():
        assert torch.equal(weighted_sum(x, x, x, backend="triton"), x)
        with pytest.raises(backend.BackendError, match=r"weighted_sum: .* forward-mode"):
            weighted_sum(x, forward_ad.make_dual(x, x), x, backend="triton")


@needs_triton
def test_the_environment_changes_what_auto_means_and_the_call_has_the_last_word(monkeypatch):
    monkeypatch.setattr(backend, "AUTO", "reference")
    assert backend.uses_triton("triton", torch.zeros(2, device="cuda" if torch.cuda.is_available() else "cpu"))
    assert not backend.uses_triton("auto", CPU)


def test_triton_where_it_cannot_run_is_an_error():
    with pytest.raises(backend.BackendError, match=r"Triton cannot compute on meta: .*; choose backend 'auto'"):
        weighted_sum(META, META, META, backend="triton")


@pytest.mark.parametrize(("name", "where"), [("auto", "REVGRAD_KERNELS"), ("cuda", "backend")])
def test_an_unknown_backend_is_named_with_its_origin(name, where, monkeypatch):
    monkeypatch.setattr(backend, "AUTO", "fast")
    with pytest.raises(ValueError, match=f"{where} must be one of auto, triton, reference, got"):
        backend.uses_triton(name, CPU)


def test_an_empty_variable_in_the_environment_is_none():
    code = "from revgrad_kernels import backend; print(backend.AUTO)"
    environment = os.environ | {"REVGRAD_KERNELS": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout == "auto\n"


def test_one_device_for_all():
    with pytest.raises(backend.BackendError, match="one device, got cpu, meta"):
        backend.uses_triton("auto", CPU, META)


def test_without_triton_the_reference_computes_and_an_explicit_request_says_what_is_missing():
    code = """
import sys
sys.modules["triton"] = None
import torch
from revgrad_kernels import backend, weighted_sum
x = torch.ones(2, 3)
assert torch.equal(weighted_sum(x, x, x), x)
try:
    weighted_sum(x, x, x, backend="triton")
except backend.BackendError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "it is not installed" in run.stdout


X, GATES = torch.zeros(2, 3), torch.zeros(2, 12)
FLAT = [torch.zeros(6, dtype=d) for d in (torch.int64, torch.int16)]
CALLS = {
    kernels.weighted_sum: {"logits": X, "x": X, "h": X, "bias": X[0]},
    kernels.weighted_sum_inverse: {"logits": X, "y": X, "h": X, "bias": X[0]},
    kernels.weighted_sum_backward: {"logits": X, "x": X, "h": X, "grad": X},
    kernels.cell_update: {"gates": GATES[:, :9], "cell": X, "bias": GATES[0, :9]},
    kernels.hidden_output: {"output_gate": X, "update": X, "added": X},
    kernels.convlstm: {"gates": GATES, "cell": X, "peephole": X[0], "bias": GATES[0]},
    kernels.stlstm_states: {
        **{"gates": GATES, "memory_gates": GATES[:, :9], "cell": X, "memory": X},
        **{"bias": GATES[0], "memory_bias": GATES[0, :9]},
    },
    kernels.exact_additive: {"target": X, "message": X},
    kernels.exact_additive_inverse: {"merged": X, "message": X},
    partial(kernels.exact_weighted_sum, reservoir=FLAT[0], level=FLAT[1], costs=FLAT[1]): {"logits": X, "x": X, "h": X},
    partial(kernels.exact_weighted_sum_refill, level=FLAT[1], costs=FLAT[1]): {"logits": X, "y": X},
    partial(kernels.exact_weighted_sum_inverse, reservoir=FLAT[0], word=FLAT[1], refill=FLAT[1] > 0): {
        **{"logits": X, "y": X, "h": X},
    },
    kernels.exact_weighted_sum_backward: {"logits": X, "x": X, "h": X, "grad": X},
}
"""All operators that compute with floats, with an argument for each of their tensors of floats."""


@pytest.mark.parametrize("function", CALLS, ids=lambda f: getattr(f, "func", f).__name__)
def test_what_holds_no_floats_is_named(function):
    name = getattr(function, "func", function).__name__
    for argument, x in CALLS[function].items():
        for dtype in (torch.complex64, torch.int64, torch.bool):
            message = f"{name}: {argument} must be float16, bfloat16, float32 or float64, not {dtype}"
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                function(**CALLS[function] | {argument: x.to(dtype)})
        with pytest.raises(TypeError, match=f"^{name}: {argument} must be a tensor, not list$"):
            function(**CALLS[function] | {argument: x.tolist()})
