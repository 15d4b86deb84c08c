import importlib
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from revgrad_kernels import exact_additive, exact_additive_inverse
from revgrad_kernels.backend import BackendError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from tests.kernels.cases import DEVICE, LAYOUTS, SHAPES, TRANSFORMS, arrange, needs_triton

module = importlib.import_module("revgrad_kernels.exact_additive")
BITS = {torch.float32: 16, torch.float64: 32}
LIMIT = {torch.float32: 2.0**8, torch.float64: 2.0**14}
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]


def grid_values(shape, dtype, spread=1.0):
    return torch.round(torch.randn(shape, dtype=dtype) * spread * 2.0 ** BITS[dtype]) * 2.0 ** -BITS[dtype]


def assert_same_bits(found, expected):
    """Zeros of either sign are told apart; one NaN is as good as another."""
    assert (found.dtype, found.shape, found.device) == (expected.dtype, expected.shape, expected.device)
    integer = torch.int32 if found.dtype == torch.float32 else torch.int64
    found, expected = (torch.where(t.isnan(), torch.nan, t).contiguous().view(integer) for t in (found, expected))
    differ = (found != expected).nonzero()
    assert not len(differ), f"differs at {differ[:5].tolist()} and {len(differ)} elements in all"


def literal(target, message, dtype):
    """Python's fractions round half to even."""
    steps = 2 ** BITS[dtype]
    return float(Fraction(target) + Fraction(round(Fraction(message) * steps), steps))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", BITS)
def test_sum_is_the_literal_oracle_at_ties_and_between_them(dtype, backend):
    step = 2.0 ** -BITS[dtype]
    halves = torch.arange(-21, 22, dtype=torch.float64).mul_(step / 2)
    message = torch.cat([halves, halves + 100, halves - 100, torch.randn(99).double()]).to(dtype)
    target = grid_values(message.shape, dtype)
    expected = [literal(t, m, dtype) for t, m in zip(target.tolist(), message.tolist(), strict=True)]
    found = exact_additive(target.to(DEVICE), message.to(DEVICE), backend=backend)
    assert found.tolist() == expected


@needs_triton
@pytest.mark.parametrize("dtype", BITS)
def test_triton_rounds_as_torch_does_from_the_smallest_number_to_nan(dtype):
    """Every exponent and both signs, with mantissas at both ends, ties among them, and with random ones."""
    mantissa, integer = (23, torch.int32) if dtype == torch.float32 else (52, torch.int64)
    exponents = torch.arange(2**8) if dtype == torch.float32 else torch.arange(1023 - 40, 1023 + 60)
    ends = [0, 1, 2, 3, 2**mantissa - 1, 2**mantissa - 2, *(2**i for i in range(2, mantissa))]
    ends += [2 ** (mantissa - 1) + 2**i for i in range(mantissa - 1)] + [3 << i for i in range(mantissa - 1)]
    mantissas = torch.cat([torch.tensor(ends), torch.randint(2**mantissa, (64,))])
    message = ((exponents[:, None] << mantissa) | mantissas).flatten().to(integer).view(dtype)
    message = torch.cat([message, -message]).to(DEVICE)
    target = torch.full_like(message, -0.0)  # keeps the sign of a zero that is added
    for function in (exact_additive, exact_additive_inverse):
        assert_same_bits(function(target, message, backend="triton"), function(target, message, backend="reference"))


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("message_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_triton_computes_the_bits_of_the_reference(dtype, message_dtype, shape, layout):
    target = arrange(grid_values(shape, dtype), layout)
    message = arrange(torch.randn(shape).to(message_dtype), layout)
    for function in (exact_additive, exact_additive_inverse):
        found = function(target, message, backend="triton")
        assert_same_bits(found, function(target, message, backend="reference"))
        # Each tensor in a layout of its own: nothing is misread.
        assert_same_bits(function(target, message.contiguous(), backend="triton"), found)
        assert_same_bits(function(target.contiguous(), message, backend="triton"), found)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    st.lists(st.integers(0, 6), max_size=5),
    st.sampled_from(list(BITS)),
    st.sampled_from(LAYOUTS),
    st.integers(0, 2**31),
)
def test_inverse_returns_every_bit(backend, shape, dtype, layout, seed):
    torch.manual_seed(seed)
    start = x = arrange(grid_values(shape, dtype, 20.0), layout)
    messages = [arrange(torch.randn(shape, dtype=dtype) * 10, layout) for _ in range(4)]
    for message in messages:
        x = exact_additive(x, message, backend=backend)
    for message in reversed(messages):
        x = exact_additive_inverse(x, message, backend=backend)
    assert torch.equal(x, start)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", BITS)
def test_largest_magnitudes_survive(dtype, backend):
    largest = LIMIT[dtype] - 2.0 ** -BITS[dtype]
    target = torch.tensor([largest, -largest, -largest, largest / 2], dtype=dtype, device=DEVICE)
    message = torch.tensor([0.0, 0.0, 2 * largest, largest / 2], dtype=dtype, device=DEVICE)
    merged = exact_additive(target, message, backend=backend)
    assert merged.tolist()[:3] == [largest, -largest, largest]
    assert torch.equal(exact_additive_inverse(merged, message, backend=backend)[:3], target[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_message_that_is_not_finite_shows_in_the_sum(backend):
    message = torch.tensor([math.nan, math.inf, -math.inf], device=DEVICE)
    found = exact_additive(torch.ones_like(message), message, backend=backend)
    assert_same_bits(found, message)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("function", "sign"), [(exact_additive, 1), (exact_additive_inverse, -1)])
def test_gradient_passes_straight_through_and_is_summed_over_what_was_broadcast(function, sign, backend):
    target = grid_values((2, 3, 4), torch.float32).to(DEVICE).requires_grad_()
    message = torch.randn(3, 1, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    out = function(target, message, backend=backend)
    grad = torch.arange(24.0, device=DEVICE).view(2, 3, 4)
    grad_target, grad_message = torch.autograd.grad(out, (target, message), grad)
    assert torch.equal(grad_target, grad)
    assert torch.equal(grad_message, sign * grad.bfloat16().sum((0, 2), keepdim=True)[0])
    with torch.no_grad():
        assert_same_bits(out.detach(), function(target, message, backend=backend))


def test_what_does_not_fit_is_named():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"exact_additive: grid values are float32 or float64, not torch\.bfloat16"):
        exact_additive(x.bfloat16(), x)
    with pytest.raises(ValueError, match=r"exact_additive_inverse: message \(2, 4\) does not broadcast to \(2, 3\)"):
        exact_additive_inverse(x, torch.zeros(2, 4))
    with pytest.raises(BackendError, match="one device, got cpu, meta"):
        exact_additive(x, x.to("meta"))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_functions_are_refused_instead_of_losing_a_derivative(transform):
    x = grid_values((2, 3), torch.float32)
    for function, name in ((exact_additive, "exact_additive"), (exact_additive_inverse, "exact_additive_inverse")):
        with pytest.raises(BackendError, match=rf"{name}: neither torch\.func .* knows exact arithmetic: choose"):
            transform(lambda m, f=function: f(x, m), torch.randn(2, 3))


def test_forward_mode_is_refused_where_there_is_a_tangent():
    x, message = grid_values((2, 3), torch.float32), torch.randn(2, 3)
    with forward_ad.dual_level():
        assert_same_bits(exact_additive(x, message), exact_additive(x, message, backend="reference"))
        with pytest.raises(BackendError, match=r"exact_additive: neither .* forward-mode differentiation knows exact"):
            exact_additive(x, forward_ad.make_dual(message, message))


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, undo, kernel):
    target = arrange(grid_values((2, 3, 4, 5), torch.float32), "contiguous").requires_grad_()
    message = arrange(torch.randn(2, 3, 4, 5, dtype=torch.float64), layout).requires_grad_()
    torch.library.opcheck(module._exact_additive, (target, message, undo, kernel))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compiles_without_a_graph_break_and_exports(backend):
    class Sum(torch.nn.Module):
        def forward(self, x, m):
            return exact_additive(x, m * 2, backend=backend)

    x = grid_values((2, 3, 4), torch.float32).to(DEVICE).requires_grad_()
    m = torch.randn(2, 3, 4, device=DEVICE, requires_grad=True)
    out = torch.compile(Sum(), backend="aot_eager", fullgraph=True)(x, m)
    assert_same_bits(out.detach(), Sum()(x, m).detach())
    assert [float(g.sum()) for g in torch.autograd.grad(out.sum(), (x, m))] == [24, 48]
    exported = torch.export.export(Sum(), (x.detach(), m.detach()))
    assert "revgrad.exact_additive" in str(exported.graph)
    assert_same_bits(exported.module()(x.detach(), m.detach()), out.detach())


def test_fake_tensors_take_the_operator_and_the_layout_of_the_message():
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 4, 4, device="cuda")
        message = torch.empty(2, 3, 4, 4, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        y = exact_additive(x, message)
    assert (y.device.type, y.dtype, y.stride()) == ("cuda", torch.float32, message.stride())
    assert exact_additive(torch.empty(2, 3, device="meta"), torch.empty(3, device="meta")).shape == (2, 3)
