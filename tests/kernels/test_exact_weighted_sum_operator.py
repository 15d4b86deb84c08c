"""The exact weighted sum as an operator of PyTorch: what it refuses, opcheck, compilation, export, fake tensors."""

import importlib

import pytest
import torch
from revgrad_kernels import (
    exact_weighted_sum,
    exact_weighted_sum_backward,
    exact_weighted_sum_inverse,
    exact_weighted_sum_refill,
)
from revgrad_kernels.backend import BackendError
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.cases import LAYOUTS, TRANSFORMS, needs_triton
from tests.kernels.test_exact_weighted_sum import BACKENDS, BITS, arguments, assert_equal

module = importlib.import_module("revgrad_kernels.exact_weighted_sum")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_do_not_exist_are_refused(backend):
    logits, x, h, *flat = arguments((2, 3))
    logits.requires_grad_()
    y, reservoir, _, word, spilled = exact_weighted_sum(logits, x, h, *flat, backend=backend)
    (first,) = torch.autograd.grad(y.sum(), logits, create_graph=True)
    with pytest.raises(BackendError, match="revgrad::exact_weighted_sum_backward has no gradient: rounding"):
        first.sum().backward()
    back = exact_weighted_sum_inverse(logits, y.detach(), h, reservoir, word, spilled, backend=backend)[0]
    with pytest.raises(BackendError, match="inverse has no gradient: differentiate exact_weighted_sum"):
        back.sum().backward()


# Errors, registration


def test_what_does_not_fit_is_named():
    logits, x, h, reservoir, level, table = (t.cpu() for t in arguments((2, 3)))
    with pytest.raises(ValueError, match=r"exact_weighted_sum: grid values are float32 or float64, not torch\.float16"):
        exact_weighted_sum(logits, x.half(), h, reservoir, level, table)
    with pytest.raises(ValueError, match=r"exact_weighted_sum: h \(2, 4\) does not broadcast to \(2, 3\)"):
        exact_weighted_sum(logits, x, torch.zeros(2, 4), reservoir, level, table)
    with pytest.raises(ValueError, match=r"a reservoir for each element of \(2, 3\), got \(6,\), \(5,\)"):
        exact_weighted_sum(logits, x, h, reservoir, level[1:], table)
    with pytest.raises(ValueError, match=r"exact_weighted_sum_refill: .* got \(2, 3\)"):
        exact_weighted_sum_refill(logits, x, level.view(2, 3), table)
    with pytest.raises(BackendError, match="one device, got cpu, meta"):
        exact_weighted_sum(logits, x, h, reservoir.to("meta"), level, table)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_functions_are_refused_instead_of_losing_a_derivative(transform):
    logits, x, h, reservoir, level, table = (t.cpu() for t in arguments((2, 3)))
    functions = {
        "": lambda t: exact_weighted_sum(t, x, h, reservoir, level, table),
        "_refill": lambda t: exact_weighted_sum_refill(t, x, level, table),
        "_inverse": lambda t: exact_weighted_sum_inverse(t, x, h, reservoir, level, level > 0),
        "_backward": lambda t: exact_weighted_sum_backward(t, x, h, x),
    }
    for name, function in functions.items():
        flat = (lambda f: lambda t: f(t.expand(2, 3)))(function)  # under vmap the shapes fit as well
        with pytest.raises(BackendError, match=rf"exact_weighted_sum{name}: neither torch\.func .* choose arithmetic="):
            transform(flat, logits)


@pytest.mark.parametrize(
    ("layout", "kernel"),
    [("strided", False), *(pytest.param(layout, True, marks=needs_triton) for layout in LAYOUTS)],
)
def test_opcheck(layout, kernel):
    logits, x, h, *flat = arguments((2, 3, 4, 5), torch.float32, torch.float64, layout)
    y, reservoir, level, word, spilled = exact_weighted_sum(logits, x, h, *flat)
    leaves = [t.requires_grad_() for t in (logits, x, h)]
    torch.library.opcheck(module._exact_weighted_sum, (*leaves, *flat, kernel))
    logits, x, h = (t.detach() for t in leaves)
    torch.library.opcheck(module._exact_weighted_sum_refill, (logits, y, level, flat[2], kernel))
    torch.library.opcheck(module._exact_weighted_sum_inverse, (logits, y, h, reservoir, word, spilled, kernel))
    torch.library.opcheck(module._exact_weighted_sum_backward, (logits, x, h, y, kernel))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compiles_without_a_graph_break_and_exports(backend):
    class There(torch.nn.Module):
        def forward(self, logits, x, h, reservoir, level, table):
            return exact_weighted_sum(logits * 1, x, h, reservoir, level, table, backend=backend)

    class Back(torch.nn.Module):
        def forward(self, logits, y, h, reservoir, level, word, table):
            level, refill = exact_weighted_sum_refill(logits, y, level, table, backend=backend)
            return *exact_weighted_sum_inverse(logits, y, h, reservoir, word, refill, backend=backend), level

    logits, x, h, reservoir, level, table = arguments((2, 3, 4))
    forward = torch.compile(There(), backend="aot_eager", fullgraph=True)
    backward = torch.compile(Back(), backend="aot_eager", fullgraph=True)
    there = forward(logits, x, h, reservoir, level, table)
    assert_equal(there, There()(logits, x, h, reservoir, level, table))
    given = (logits, there[0], h, *there[1:4], table)
    assert_equal(backward(*given), (x, reservoir, level))
    for part, inputs in ((There(), (logits, x, h, reservoir, level, table)), (Back(), given)):
        exported = torch.export.export(part, inputs)
        # The operators themselves, not what a compiler may round another way.
        assert "revgrad.exact_weighted_sum" in str(exported.graph)
        assert "sigmoid" not in str(exported.graph)
        assert_equal(exported.module()(*inputs), part(*inputs))
    leaf = logits.clone().requires_grad_()
    grads = [
        torch.autograd.grad(f(leaf, x, h, reservoir, level, table)[0].square().sum(), leaf) for f in (forward, There())
    ]
    assert_equal(*grads)


def test_fake_tensors_take_the_operators():
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits, x, h = (torch.empty(2, 3, 4, 4, device="cuda").to(memory_format=torch.channels_last) for _ in range(3))
        reservoir, level = (torch.empty(96, dtype=d, device="cuda") for d in (torch.int64, torch.int16))
        table = torch.empty(2**BITS + 1, dtype=torch.int16, device="cuda")
        y, *flat = exact_weighted_sum(logits, x, h, reservoir, level, table)
        before, refill = exact_weighted_sum_refill(logits, y, flat[1], table)
        back, _ = exact_weighted_sum_inverse(logits, y, h, flat[0], flat[2], refill)
        grads = exact_weighted_sum_backward(logits, x, h, y)
    assert y.is_contiguous()
    assert back.is_contiguous()
    assert [t.dtype for t in flat] == [torch.int64, torch.int16, torch.int16, torch.bool]
    assert all(t.shape == (96,) and t.device.type == "cuda" for t in (*flat, before, refill))
    assert all(g.stride() == x.stride() for g in grads)
    meta = [t.to("meta") for t in arguments((2, 3))]
    assert exact_weighted_sum(*meta)[0].shape == (2, 3)
