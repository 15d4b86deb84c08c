import importlib
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from revgrad_kernels import (
    exact_weighted_sum,
    exact_weighted_sum_backward,
    exact_weighted_sum_inverse,
    exact_weighted_sum_refill,
    level_costs,
    weighted_sum_backward,
)

from tests.kernels.cases import DEVICE, LAYOUTS, SHAPES, arrange, assert_close, needs_triton

module = importlib.import_module("revgrad_kernels.exact_weighted_sum")
BITS = 16
FULL = 16 * 512
FRACTION_BITS = {torch.float32: 16, torch.float64: 32}
LIMIT = {torch.float32: 2.0**8, torch.float64: 2.0**14}
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]


def literal_forget(value, numerator, reservoir, bits):
    """The module docstring, in Python's unbounded integers."""
    digit, rest = reservoir % numerator, reservoir // numerator
    product = value * numerator + digit
    return product // 2**bits, rest * 2**bits + product % 2**bits


def costs():
    return level_costs(torch.device(DEVICE))


def grid_values(shape, dtype, spread=1.0):
    return (
        torch.round(torch.randn(shape, dtype=dtype) * spread * 2.0 ** FRACTION_BITS[dtype])
        / 2.0 ** (FRACTION_BITS[dtype])
    )


def clear_of_ties(logits):
    """Logits whose `2^16 (1 - g)` is not within 0.05 of a tie.

    There the last bit of the exponential, in which implementations differ, decides which integer it is rounded to.
    In float32 a sigmoid is good to 2^16 2^-23 = 0.01 of that.
    """
    rest = 2.0**BITS * (1 - torch.sigmoid(logits.double()))
    return torch.where(((rest % 1) - 0.5).abs() < 0.05, 0.0, logits)


def reservoirs(numel, filled=True):
    """Levels from empty to full, each with an integer that such a level may hold."""
    level = torch.randint(FULL, (numel,)) * filled
    reservoir = (torch.rand(numel, dtype=torch.float64) * 2.0 ** (30 + level / 512)).long() * filled
    return reservoir.to(DEVICE), level.to(torch.int16).to(DEVICE)


def arguments(shape, dtype=torch.float32, message_dtype=None, layout="contiguous", spread=3.0):
    """`logits, x, h, reservoir, level, costs`."""
    message_dtype = message_dtype or dtype
    logits, h = (torch.randn(shape).to(message_dtype) * s for s in (spread, 1.0))
    tensors = (arrange(t, layout) for t in (clear_of_ties(logits), grid_values(shape, dtype), h))
    return *tensors, *reservoirs(math.prod(shape)), costs()


def undo(logits, y, h, reservoir, level, word, spilled, backend):
    """`(x, reservoir, level)` before the update, the words found as the engine finds them: packed, then unpacked."""
    level, refill = exact_weighted_sum_refill(logits, y, level, costs(), backend=backend)
    assert torch.equal(refill, spilled)
    words = torch.zeros_like(level).masked_scatter_(refill, word[spilled])
    return *exact_weighted_sum_inverse(logits, y, h, reservoir, words, refill, backend=backend), level


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
        differ = ((one != other) & ~(one.isnan() & other.isnan())).nonzero()
        assert not len(differ), f"differs at {differ[:5].tolist()} and {len(differ)} elements in all"


def literal_update(gate, x, h, reservoir, level):
    """The module docstring for one element, in Python's integers, from the float gate on."""
    bits = FRACTION_BITS[x.dtype]
    numerator = max(1, round(Fraction(float(1 - gate)) * 2**BITS))
    rounded_gate = 1 - numerator / 2**BITS
    shift = round(Fraction(float(rounded_gate * h)) * 2**bits)
    value = int(Fraction(float(x)) * 2**bits)
    scaled, reservoir = literal_forget(value, numerator, int(reservoir), BITS)
    level = int(level) + int(costs()[numerator])
    word = (reservoir + 2**15) % 2**16 - 2**15
    spilled = level >= FULL
    if spilled:
        reservoir, level = reservoir >> 16, level - FULL
    return float(Fraction(scaled + shift, 2**bits)), reservoir, level, word, spilled


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FRACTION_BITS, ids=str)
def test_update_is_the_literal_oracle(dtype, backend):
    logits, x, h, reservoir, level, table = arguments((600,), dtype)
    found = exact_weighted_sum(logits, x, h, reservoir, level, table, backend=backend)
    gates = torch.sigmoid(logits.cpu())
    expected = [literal_update(*case) for case in zip(gates, x.cpu(), h.cpu(), reservoir, level, strict=True)]
    assert list(zip(*(t.tolist() for t in found), strict=True)) == expected
    assert 30 < found[-1].sum() < 300


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FRACTION_BITS, ids=str)
def test_sum_is_within_two_grid_steps_of_its_formula(dtype, backend):
    logits, x, h, reservoir, level, table = arguments((4, 25), dtype)
    y = exact_weighted_sum(logits, x, h, reservoir, level, table, backend=backend)[0]
    gate = torch.round(torch.sigmoid(logits.double()) * 2**BITS).clamp_max(2**BITS - 1) / 2**BITS
    expected = (1 - gate) * x.double() + gate * h.double()
    assert ((y.double() - expected).abs() < 2 * 2.0 ** -FRACTION_BITS[dtype] + 2e-7 * h.abs()).all()


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("message_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", FRACTION_BITS, ids=str)
def test_triton_computes_the_bits_of_the_reference(dtype, message_dtype, shape, layout):
    logits, x, h, reservoir, level, table = arguments(shape, dtype, message_dtype, layout)
    forward = [exact_weighted_sum(logits, x, h, reservoir, level, table, backend=b) for b in ("triton", "reference")]
    assert_equal(*forward)
    y, after, new_level, word, spilled = forward[0]
    y = arrange(y, layout)
    back = [undo(logits, y, h, after, new_level, word, spilled, b) for b in ("triton", "reference")]
    assert_equal(*back)
    assert_equal(back[0], (x.contiguous(), reservoir, level))


@needs_triton
def test_strided_reservoirs_are_not_misread():
    logits, x, h, *flat = arguments((3, 5, 7))
    gapped = [torch.stack([t, torch.full_like(t, 77)], dim=-1)[..., 0] for t in flat]
    found = exact_weighted_sum(logits, x, h, *gapped, backend="triton")
    assert_equal(found, exact_weighted_sum(logits, x, h, *flat, backend="reference"))
    y, reservoir, level, word, spilled = (torch.stack([t, t], dim=-1)[..., 0] for t in found)
    assert_equal(undo(logits, y, h, reservoir, level, word, spilled, "triton"), (x, *flat[:2]))


KINDS = {
    "normal": lambda shape: torch.randn(shape) * 3,
    "open": lambda shape: torch.full(shape, 30.0),
    "closed": lambda shape: torch.full(shape, -math.inf),
    "ends": lambda shape: torch.where(torch.rand(shape) < 0.5, math.inf, -math.inf),
    "huge": lambda shape: torch.randn(shape) * 1e38,
    # Where implementations of the exponential disagree on the integer: an inverse must not.
    "ties": lambda shape: torch.logit((torch.randint(2**BITS - 1, shape) + 0.5).double() / 2**BITS),
}


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(data=st.data())
def test_inverse_returns_every_bit_whatever_the_gates(backend, data):
    shape = data.draw(st.sampled_from([(1,), (3, 5), (2, 3, 1, 7), (1025,), (2, 0)]))
    dtype = data.draw(st.sampled_from(list(FRACTION_BITS)))
    message_dtype = data.draw(st.sampled_from([dtype, torch.bfloat16, torch.float64]))
    kinds = data.draw(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=8))
    layout = data.draw(st.sampled_from(LAYOUTS))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x, (reservoir, level) = grid_values(shape, dtype, 20.0).to(DEVICE), reservoirs(math.prod(shape))
    tape = []
    for kind in kinds:
        logits, h = (arrange(t.to(message_dtype), layout) for t in (KINDS[kind](shape), torch.randn(shape) * 9))
        before = x, reservoir, level
        x, reservoir, level, word, spilled = exact_weighted_sum(*(logits, x, h), *before[1:], costs(), backend=backend)
        assert not len(level) or (level.min() >= 0 and level.max() < FULL)
        assert (reservoir >= 0).all()
        assert (reservoir.double() < 2.0 ** (30 + level.double() / 512)).all()
        tape.append((logits, h, word, spilled, before))
    for logits, h, word, spilled, before in reversed(tape):
        x, reservoir, level = undo(logits, x, h, reservoir, level, word, spilled, backend)
        assert_equal((x, reservoir, level), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_chain_spills_and_comes_back(backend):
    start = x = grid_values((500,), torch.float32).to(DEVICE)
    reservoir, level = reservoirs(500, filled=False)
    empty = reservoir, level
    tape, spills = [], torch.zeros(500, dtype=torch.int64, device=DEVICE)
    for _ in range(40):
        logits, h = (torch.randn(500, device=DEVICE) * s for s in (3.0, 1.0))
        x, reservoir, level, word, spilled = exact_weighted_sum(
            logits, x, h, reservoir, level, costs(), backend=backend
        )
        tape.append((logits, h, word, spilled))
        spills += spilled
    assert spills.min() >= 2
    for logits, h, word, spilled in reversed(tape):
        x, reservoir, level = undo(logits, x, h, reservoir, level, word, spilled, backend)
    assert_equal((x, reservoir, level), (start, *empty))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FRACTION_BITS, ids=str)
def test_largest_magnitudes_survive(dtype, backend):
    largest = LIMIT[dtype] - 2.0 ** -FRACTION_BITS[dtype]
    x = torch.tensor([largest, -largest, 0.0, -(2.0 ** -FRACTION_BITS[dtype])] * 4, dtype=dtype, device=DEVICE)
    logits = torch.tensor([-math.inf, -11.0, 0.3, 40.0], dtype=dtype, device=DEVICE).repeat_interleave(4)
    level = torch.full((16,), FULL - 1, dtype=torch.int16, device=DEVICE)
    for reservoir in (torch.zeros(16, dtype=torch.int64, device=DEVICE), (level.long() << 33)):
        y, *after = exact_weighted_sum(logits, x, torch.zeros_like(x), reservoir, level, costs(), backend=backend)
        assert_equal(undo(logits, y, torch.zeros_like(x), *after, backend), (x, reservoir, level))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows_in_the_sum_and_spills_as_a_closed_gate(backend):
    logits = torch.tensor([math.nan, 50.0, 0.0, math.nan], device=DEVICE)
    x, h = torch.ones(4, device=DEVICE), torch.tensor([1.0, 1.0, math.nan, 2.0], device=DEVICE)
    reservoir, level = reservoirs(4)
    y, _, new_level, _, spilled = exact_weighted_sum(logits, x, h, reservoir, level, costs(), backend=backend)
    assert y.isnan().tolist() == [True, False, True, True]
    assert spilled.tolist()[0] == spilled.tolist()[1] == spilled.tolist()[3] is True
    old_level, refill = exact_weighted_sum_refill(logits, y, new_level, costs(), backend=backend)
    assert_equal((old_level, refill), (level, spilled))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FRACTION_BITS, ids=str)
def test_a_stream_that_is_not_finite_shows_in_the_sum(dtype, backend):
    logits, x, h, *flat = arguments((2, 9), dtype)
    expected = exact_weighted_sum(logits, x, h, *flat, backend=backend)[0]
    x[0, ::3] = torch.tensor([math.nan, math.inf, -math.inf])
    found = exact_weighted_sum(logits, x, h, *flat, backend=backend)[0]
    assert_equal((found,), (torch.where(x.isfinite(), expected, math.nan),))


def test_gates_do_not_depend_on_strides_in_the_reference():
    """A sigmoid on a CPU does: its last bits differ between the vectorised and the plain loop."""
    _, x, h, *flat = (t.cpu() for t in arguments((3, 5, 31, 37)))
    logits = KINDS["ties"](x.shape).float()
    expected = exact_weighted_sum(logits, x, h, *flat, backend="reference")
    for layout in LAYOUTS:
        arranged = (arrange(t, layout).cpu() for t in (logits, x, h))
        assert_equal(exact_weighted_sum(*arranged, *flat, backend="reference"), expected)


# Gradients


def straight_through(logits, x, h, grad):
    """Gradients of `(1 - g) x + g h` where the sum uses the rounded gate and the sigmoid's slope is its own."""
    gate = torch.sigmoid(logits.to(x.dtype))
    rounded = 1 - torch.round((1 - gate) * 2**BITS).clamp(1, 2**BITS) / 2**BITS
    grads = (h - x) * grad * (gate * (1 - gate)), (1 - rounded) * grad, rounded * grad
    return tuple(g.to(t.dtype) for g, t in zip(grads, (logits, x, h), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "message_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64)],
    ids=str,
)
def test_backward_passes_straight_through(dtype, message_dtype, shape, layout, backend):
    logits, x, h = arguments(shape, dtype, message_dtype, layout)[:3]
    grad = torch.randn(shape, dtype=dtype).to(DEVICE)
    expected = straight_through(logits, x, h, grad)
    grad = grad.double()  # whose dtype is not that of a result
    for found, wanted in zip(exact_weighted_sum_backward(logits, x, h, grad, backend=backend), expected, strict=True):
        assert_close(found, wanted)
    # And the slopes are nearly those of the sum that is not rounded.
    smooth = weighted_sum_backward(logits.double(), x.double(), h.double(), grad.double())
    for found, wanted in zip(expected, smooth, strict=True):
        assert_close(found.double(), wanted, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_reach_the_inputs_and_are_summed_over_what_was_broadcast(backend):
    logits, x, h, *flat = arguments((2, 3, 4))
    logits, h = clear_of_ties(logits[:1, :, :1]).requires_grad_(), h.requires_grad_()
    x.requires_grad_()
    y, *integers = exact_weighted_sum(logits, x, h, *flat, backend=backend)
    assert not any(t.requires_grad for t in integers)
    grad = torch.randn_like(y)
    expected = straight_through(logits.detach().expand_as(x), x.detach(), h.detach(), grad)
    expected = (expected[0].sum((0, 2), keepdim=True), *expected[1:])
    for found, wanted in zip(torch.autograd.grad(y, (logits, x, h), grad), expected, strict=True):
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)
