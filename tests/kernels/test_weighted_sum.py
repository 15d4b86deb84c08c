import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from revgrad_kernels import weighted_sum, weighted_sum_backward, weighted_sum_inverse
from revgrad_kernels.backend import BackendError
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.cases import DEVICE, LAYOUTS, SHAPES, TOLERANCES, arrange, assert_close, needs_triton

module = importlib.import_module("revgrad_kernels.weighted_sum")
OPERATORS = {"weighted_sum": module._weighted_sum, "weighted_sum_inverse": module._weighted_sum_inverse}
BOUND = {torch.float32: 4e-7, torch.float64: 1e-15}


def inputs(shape, dtype, spread=1.5):
    return (
        torch.randn(shape, dtype=dtype) * spread,
        torch.randn(shape, dtype=dtype),
        torch.randn(shape, dtype=dtype),
    )


def with_gradients(function, tensors, grad, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 7, 5), (1025,)])
@pytest.mark.parametrize("dtype", BOUND)
def test_weighted_sum_is_its_formula(shape, dtype):
    a, x, h = inputs(shape, dtype)
    gate = 1 / (1 + torch.exp(-a.double()))
    expected = (1 - gate) * x.double() + gate * h.double()
    found = weighted_sum(a, x, h)
    assert found.dtype == dtype
    size = torch.maximum(x.abs(), h.abs())
    assert ((found.double() - expected).abs() <= BOUND[dtype] * size).all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_closed_and_open_gate_pass_one_side_unchanged(backend):
    _, x, h = (t.to(DEVICE) for t in inputs((7,), torch.float32))
    assert torch.equal(weighted_sum(torch.full_like(x, -200.0), x, h, backend=backend), x)
    assert torch.equal(weighted_sum(torch.full_like(x, 200.0), x, h, backend=backend), h)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", BOUND)
def test_inverse_error_is_bounded_by_the_amplification(dtype, backend):
    a, x, h = (t.to(DEVICE) for t in inputs((4001,), dtype))
    y = weighted_sum(a, x, h, backend=backend)
    error = (weighted_sum_inverse(a, y, h, backend=backend) - x).abs()
    # The rounding of y and of the gate, amplified by 1 / (1 - g) = 1 + exp(a).
    bound = 4 * torch.finfo(dtype).eps * (1 + torch.exp(a)) * (x.abs() + h.abs())
    assert (error <= bound).all()
    # The bound is no slack: without the amplification it is broken.
    assert (error > 4 * torch.finfo(dtype).eps * (x.abs() + h.abs())).any()


def test_backward_is_the_gradient():
    a, x, h = (t.requires_grad_() for t in inputs((3, 5), torch.float64))
    grad = torch.randn(3, 5, dtype=torch.float64)
    gate = torch.sigmoid(a)
    expected = torch.autograd.grad((1 - gate) * x + gate * h, (a, x, h), grad)
    for found, wanted in zip(weighted_sum_backward(a, x, h, grad), expected, strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("function", [weighted_sum, weighted_sum_inverse])
def test_gradcheck(function, backend):
    leaves = [t.to(DEVICE).requires_grad_() for t in (*inputs((2, 3, 2, 2), torch.float64), torch.randn(3).double())]
    assert torch.autograd.gradcheck(lambda *tensors: function(*tensors, backend=backend), leaves)


@needs_triton
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("function", [weighted_sum, weighted_sum_inverse])
def test_triton_computes_what_the_reference_does(function, dtype, shape, layout, biased):
    # Closed gates, whose inverse amplifies little: rounding in half precision stays what it is.
    a, x, h = (arrange(t.to(dtype), layout) for t in inputs(shape, torch.float32, spread=0.5))
    tensors = [a, x, h, *([torch.randn(shape[1]).to(dtype).to(DEVICE)] if biased else [])]
    grad = torch.randn(shape).to(DEVICE)
    found = with_gradients(function, tensors, grad, backend="triton")
    expected = with_gradients(function, tensors, grad, backend="reference")
    for one, other in zip(found[:4], expected[:4], strict=True):
        assert_close(one, other, **{k: 4 * v for k, v in TOLERANCES[dtype].items()})
    if biased:
        # A sum of many rounded terms: the tolerance grows with their number.
        terms = max(1, a.numel() // shape[1])
        assert_close(found[4], expected[4], rtol=0, atol=8 * TOLERANCES[dtype]["atol"] * terms**0.5)


@needs_triton
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=5),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_triton_computes_what_the_reference_does_whatever_the_shape(shape, layout, biased, seed):
    torch.manual_seed(seed)
    a, x, h = (arrange(t, layout) for t in inputs(shape, torch.float64))
    bias = torch.randn(shape[1], dtype=torch.float64).to(DEVICE) if biased else None
    for function in (weighted_sum, weighted_sum_inverse):
        assert_close(
            function(a, x, h, bias, backend="triton"),
            function(a, x, h, bias, backend="reference"),
            rtol=1e-9,
            atol=1e-9,
        )


@needs_triton
def test_a_strided_bias_is_read_as_it_is():
    a, x, h = (t.to(DEVICE) for t in inputs((2, 3, 4, 4), torch.float32))
    bias = torch.randn(6, device=DEVICE)[::2]
    grad = torch.randn_like(x)
    found, expected = (with_gradients(weighted_sum, (a, x, h, bias), grad, backend=b) for b in ("triton", "reference"))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-5)


@needs_triton
def test_gradients_of_the_bias_are_the_same_bits_in_every_run():
    a, x, h = (t.to(DEVICE) for t in inputs((4, 7, 33, 31), torch.float32))
    bias, grad = torch.randn(7, device=DEVICE), torch.randn_like(x)
    first, second = (with_gradients(weighted_sum, (a, x, h, bias), grad, backend="triton")[4] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("function", [weighted_sum, weighted_sum_inverse])
def test_a_bias_in_float64_counts_as_the_other_inputs_do(function, backend):
    a, x, h = (t.to(DEVICE) for t in inputs((2, 3, 4), torch.float32))
    a, bias = a - 2**25, torch.full((3,), 2.0**25 + 0.5, dtype=torch.float64, device=DEVICE)
    grad = torch.randn_like(x)
    found = with_gradients(function, (a, x, h, bias), grad, backend=backend)
    expected = with_gradients(function, [t.double() for t in (a, x, h, bias)], grad, backend="reference")
    for one, other in zip(found[:4], expected[:4], strict=True):
        assert_close(one, other.float())


@needs_triton
@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (2, 0), (0, 3)], ids=str)
def test_gradients_of_empty_tensors(shape):
    tensors = [torch.zeros(s, device=DEVICE) for s in (shape, shape, shape, shape[1:2])]
    found, expected = (with_gradients(weighted_sum, tensors, tensors[0], backend=b) for b in ("triton", "reference"))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_inputs_broadcast_and_their_gradients_are_summed(backend):
    a, x, h = torch.randn(3, 1, 4), torch.randn(2, 3, 5, 4), torch.randn(1)
    leaves = [t.to(DEVICE).requires_grad_() for t in (a, x, h)]
    out = weighted_sum(*leaves, backend=backend)
    expected = torch.lerp(leaves[1], leaves[2].expand_as(leaves[1]), torch.sigmoid(leaves[0]))
    assert_close(out, expected)
    grad = torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(y, leaves, grad) for y in (out, expected)), strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_mixed_dtypes_follow_the_stream_also_under_autocast(backend):
    a, x, h = (t.to(DEVICE) for t in inputs((2, 3, 4, 4), torch.float32))
    leaves = [t.requires_grad_() for t in (a.bfloat16(), x, h.bfloat16())]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = weighted_sum(*leaves, backend=backend)
    assert out.dtype == torch.float32
    assert_close(out, weighted_sum(leaves[0].float(), x, leaves[2].float(), backend="reference"))
    assert [g.dtype for g in torch.autograd.grad(out.sum(), leaves)] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_shapes_that_do_not_fit_are_named():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"weighted_sum: h \(2, 3, 5\) does not broadcast to \(2, 3, 4\)"):
        weighted_sum(x, x, torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"logits \(2, 2, 3, 4\) does not broadcast to \(2, 3, 4\)"):
        weighted_sum(torch.zeros(2, 2, 3, 4), x, x)
    with pytest.raises(ValueError, match=r"one element per channel of \(2, 3, 4\), got \(4,\)"):
        weighted_sum(x, x, x, torch.zeros(4))


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(BackendError, match="one device, got cpu, meta"):
        weighted_sum(torch.zeros(2, device="meta"), torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator, layout, biased):
    a, x, h = (arrange(t, layout).requires_grad_() for t in inputs((2, 3, 4, 5), torch.float32))
    bias = torch.randn(3, device=DEVICE, requires_grad=True) if biased else None
    torch.library.opcheck(OPERATORS[operator], (a, x, h, bias))
    torch.library.opcheck(module._weighted_sum_backward, [t if t is None else t.detach() for t in (a, x, h, x, bias)])


def test_second_derivatives_exist_in_the_reference_and_are_refused_in_triton():
    leaves = [t.to(DEVICE).requires_grad_() for t in inputs((2, 3), torch.float64)]
    assert torch.autograd.gradgradcheck(lambda *t: weighted_sum(*t, backend="reference"), leaves)
    (first,) = torch.autograd.grad(OPERATORS["weighted_sum"](*leaves, None).sum(), leaves[:1], create_graph=True)
    with pytest.raises(BackendError, match=r"weighted_sum_backward has no gradient: .* choose backend='reference'"):
        first.sum().backward()


@needs_triton
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_without_a_graph_break_and_exports(backend):
    class Blend(torch.nn.Module):
        def forward(self, a, x, h):
            return weighted_sum(a * 2, x, h, backend=backend)

    tensors = [t.to(DEVICE).requires_grad_() for t in inputs((2, 3, 4), torch.float32)]
    compiled = torch.compile(Blend(), backend="aot_eager", fullgraph=True)
    grad = torch.randn(2, 3, 4, device=DEVICE)
    for one, other in zip(*(with_gradients(f, tensors, grad) for f in (compiled, Blend())), strict=True):
        assert_close(one, other)
    plain = tuple(t.detach() for t in tensors)
    exported = torch.export.export(Blend(), plain).module()
    assert_close(exported(*plain), Blend()(*plain))


def test_fake_tensors_of_a_gpu_take_the_operator_and_keep_the_layout():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.profiler.profile() as profile:
        a, x, h = (torch.empty(2, 3, 4, 4, device="cuda").to(memory_format=torch.channels_last) for _ in range(3))
        y = weighted_sum(a, x, h)
    assert y.device.type == "cuda"
    assert y.stride() == x.stride()
    assert "revgrad::weighted_sum" in {event.name for event in profile.events()}
    assert weighted_sum(*(torch.empty(2, 3, device="meta") for _ in range(3))).shape == (2, 3)
