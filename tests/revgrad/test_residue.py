import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from revgrad_kernels.reservoir import level_costs

from revgrad import Residue, ReversibilityError, StreamError, snap
from revgrad.residue import GATE_BITS, Grid, entropy_bits, grid_of, quantise_gate

TOP = 2**GATE_BITS
MEAN_GATES = [0.1, 0.5, 0.9, 0.99]


def grid_values(shape, dtype=torch.float32, spread=1.0):
    return snap(torch.randn(shape, dtype=dtype) * spread)


def numerators(shape, mean=0.0, spread=1.5):
    return quantise_gate(torch.sigmoid(torch.randn(shape, dtype=torch.float64) * spread + mean))


def logit_mean(gate):
    """The mean of normal logits with deviation 1.5 whose sigmoid has this mean."""
    normal = math.sqrt(2) * torch.erfinv(torch.linspace(-1, 1, 4003, dtype=torch.float64)[1:-1])
    low, high = -20.0, 20.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if torch.sigmoid(1.5 * normal + middle).mean() < gate else (low, middle)
    return low


# Grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snap_is_the_nearest_grid_value(dtype):
    x = torch.randn(1000, dtype=dtype) * 5
    grid = grid_of(x)
    step = 2.0**-grid.fraction_bits
    snapped = snap(x)
    assert ((snapped - x).abs() <= step / 2).all()
    assert torch.equal(snapped / step, torch.round(snapped / step))
    assert torch.equal(snap(snapped), snapped)
    assert torch.equal(grid.to_floats(grid.to_integers(snapped), dtype), snapped)


@pytest.mark.parametrize(("dtype", "mantissa"), [(torch.float32, 24), (torch.float64, 53)])
def test_grid_fits_the_mantissa_and_the_product_fits_64_bits(dtype, mantissa):
    grid = grid_of(torch.zeros(1, dtype=dtype))
    assert grid.fraction_bits + grid.integer_bits <= mantissa
    assert grid.fraction_bits + grid.integer_bits + GATE_BITS < 63


def test_grid_keeps_its_largest_value():
    grid = Grid(16, 8)
    largest = torch.tensor([grid.limit - 2.0**-16, -grid.limit + 2.0**-16])
    assert torch.equal(snap(largest), largest)
    assert grid.to_integers(largest).tolist() == [2**24 - 1, -(2**24) + 1]


def test_snap_gradient_passes_straight_through():
    x = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(snap(x), x, torch.arange(5.0))
    assert torch.equal(grad, torch.arange(5.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_dtype_without_a_grid(dtype):
    with pytest.raises(StreamError, match=f"float32 or float64, not {dtype}: convert them in front of the chain"):
        snap(torch.zeros(2, dtype=dtype))


def test_quantised_gates_stay_in_range_and_within_half_a_step():
    gate = torch.cat([torch.tensor([0.0, 1.0, 1e-9, 1 - 1e-9, 0.5]), torch.rand(1000)]).double()
    n = quantise_gate(gate)
    assert n.dtype == torch.int64
    assert n.min() == 1
    assert n.max() == TOP
    inner = (gate < 1 - 1.0 / TOP).nonzero().flatten()
    assert ((1 - gate[inner] - n[inner] / TOP).abs() <= 0.5 / TOP).all()
    assert quantise_gate(torch.tensor([math.nan])).item() == 1


def test_entropy_of_known_gates():
    assert entropy_bits(torch.tensor([TOP, TOP // 2, 1])) == 0 + 1 + 16
    assert math.isnan(entropy_bits(torch.zeros(0, dtype=torch.int64)))


# Scaling


@given(data=st.data())
def test_scale_is_within_one_step_of_the_exact_product_and_unscale_returns_every_bit(data):
    shape = data.draw(st.sampled_from([(1,), (3, 5), (1025,), (2, 1, 7)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    seed = data.draw(st.integers(0, 2**31))
    updates = data.draw(st.integers(1, 30))
    kinds = data.draw(st.lists(st.sampled_from(["normal", "open", "closed", "ends", "any"]), min_size=1, max_size=4))
    torch.manual_seed(seed)
    gates = {
        "normal": lambda: numerators(shape),
        "open": lambda: torch.full(shape, TOP),
        "closed": lambda: torch.ones(shape, dtype=torch.int64),
        "ends": lambda: torch.where(torch.rand(shape) < 0.5, 1, TOP),
        "any": lambda: torch.randint(1, TOP + 1, shape),
    }
    step = 2.0 ** -grid_of(torch.zeros(1, dtype=dtype)).fraction_bits
    residue, tape = Residue(), []
    for i in range(updates):
        x, n = grid_values(shape, dtype, 20.0), gates[kinds[i % len(kinds)]]()
        scaled = residue.scale(x, n)
        assert scaled.dtype == dtype
        assert scaled.shape == x.shape
        # float64 holds the product exactly: at most 46 + 17 bits, of which the comparison needs 53.
        assert ((scaled.double() - x.double() * n / TOP).abs() < step * (1 + 1e-6)).all()
        tape.append((x, n, scaled))
    for x, n, scaled in reversed(tape):
        assert torch.equal(residue.unscale(scaled, n), x)
    residue.check_undone_to()
    assert residue.used_bits == 0


def test_every_level_of_the_reservoir_spills_and_comes_back():
    """From each of the 8192 levels, gates of every cost: a spill must happen once, and be undone once."""
    table = level_costs(torch.device("cpu"))
    elements = torch.arange(2**13)
    residue, tape = Residue(), []

    def scale(numerator):
        x = grid_values((2**13,), torch.float32, 20.0)
        tape.append((x, numerator, residue.scale(x, numerator)))

    for bit in (*range(12), 12, 12):  # no gate costs 2^12 levels: twice 2^11
        n = int((table == 2 ** min(bit, 11)).nonzero()[0])
        scale(torch.where((elements >> bit & 1).bool(), n, TOP))
    assert sorted(residue._pools[2**13].level.tolist()) == list(range(2**13))
    for n in (1, TOP, TOP, 1, 1, 2, TOP - 1, 3, TOP, 1):
        scale(torch.full((2**13,), n))
        assert residue._pools[2**13].level.min() >= 0
        assert residue._pools[2**13].level.max() < 2**13
    for x, n, scaled in reversed(tape):
        assert torch.equal(residue.unscale(scaled, n), x)
    residue.check_undone_to()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_largest_magnitudes_survive(dtype):
    grid = grid_of(torch.zeros(1, dtype=dtype))
    largest = grid.limit - 2.0**-grid.fraction_bits
    x = torch.tensor([largest, -largest, 0.0, -(2.0**-grid.fraction_bits)], dtype=dtype)
    residue, tape = Residue(), []
    for n in (1, TOP, TOP - 1, 3, 1, 1, 40503):
        numerator = torch.full((4,), n)
        tape.append((residue.scale(x, numerator), numerator))
    for scaled, numerator in reversed(tape):
        assert torch.equal(residue.unscale(scaled, numerator), x)


def test_sizes_have_reservoirs_of_their_own():
    residue = Residue()
    small, large = grid_values(3), grid_values((4, 5))
    n, m = numerators(3), numerators((4, 5))
    first, second = residue.scale(small, n), residue.scale(large, m)
    # Different sizes need not be undone in order.
    assert torch.equal(residue.unscale(first, n), small)
    assert torch.equal(residue.unscale(second, m), large)


# Cost


@pytest.mark.parametrize("mean", MEAN_GATES)
def test_residue_is_within_a_tenth_of_the_entropy(mean, record_property):
    updates, elements = 300, 512
    residue = Residue()
    bound, half_bound, half_bits = 0.0, 0.0, 0
    gates = 0.0
    for i in range(updates):
        if i == updates // 2:
            half_bound, half_bits = bound, residue.bits
        n = numerators((elements,), logit_mean(mean))
        gates += float((1 - n / TOP).mean()) / updates
        bound += entropy_bits(n)
        residue.scale(grid_values((elements,)), n)
    assert gates == pytest.approx(mean, abs=0.005)
    record_property("bits_per_update", residue.used_bits / updates / elements)
    assert bound <= residue.used_bits <= 1.1 * bound
    # What is really stored grows by whole words only; so from one half to the other it cannot fall behind by more
    # than one.
    stored, needed = residue.bits - half_bits, bound - half_bound
    assert needed - 16 * elements <= stored <= 1.1 * needed


@pytest.mark.parametrize("n", [1, 2, 3, 40503, TOP - 1, TOP])
def test_level_never_claims_less_than_the_information(n):
    """An element at level L must hold an integer below 2^(30 + L / 512), or a spilled word would lose its top bits."""
    residue = Residue()
    numerator = torch.full((64,), n)
    for _ in range(100):
        residue.scale(grid_values((64,), torch.float32, 50.0), numerator)
        pool = residue._pools[64]
        assert (pool.value >= 0).all()
        assert (pool.value.double() < 2.0 ** (30 + pool.level.double() / 512)).all()


def test_bits_count_words_reservoirs_and_levels():
    residue = Residue()
    assert residue.bits == 0
    numerator = torch.ones(10, dtype=torch.int64)  # 16 bits an update: one word each
    for i in range(5):
        residue.scale(grid_values(10), numerator)
        assert residue.bits == 10 * (64 + 16) + 10 * 16 * (i + 1)
        assert residue.used_bits == pytest.approx(10 * 16 * (i + 1), rel=0.001)
    residue.scale(grid_values((2, 10)), torch.full((2, 10), TOP))
    assert residue.bits == 10 * (80 + 80) + 20 * 80
    held = sum(x.numel() * x.element_size() for x in residue.tensors())
    assert held * 8 == residue.bits


def test_dropping_the_words_changes_no_value():
    kept, dropped = Residue(), Residue(keep=False)
    for _ in range(20):
        x, n = grid_values(50), numerators(50, 2.0)
        assert torch.equal(kept.scale(x, n), dropped.scale(x, n))
    assert dropped.bits == 50 * 80 < kept.bits


# Misuse


def test_undoing_without_a_residue():
    with pytest.raises(ReversibilityError, match="needs the residue of the forward pass"):
        Residue().unscale(grid_values(3), numerators(3))


@pytest.mark.parametrize("keep", [True, False])
def test_undoing_more_than_was_done(keep):
    residue = Residue(keep=keep)
    n = numerators(3)
    scaled = residue.scale(grid_values(3), n)
    if keep:
        residue.unscale(scaled, n)
    with pytest.raises(ReversibilityError, match="exhausted"):
        residue.unscale(scaled, n)


def test_wrong_gates_are_noticed():
    residue = Residue()
    n = torch.full((100,), 100)
    for _ in range(10):
        scaled = residue.scale(grid_values(100), n)

    def undo_all():
        for _ in range(10):
            residue.unscale(scaled, torch.full((100,), TOP - 100))

    with pytest.raises(ReversibilityError, match="does not fit the gates"):
        undo_all()


def test_what_is_left_over_is_noticed():
    residue = Residue()
    residue.check_undone_to()
    n = torch.full((4,), TOP // 3)
    scaled = residue.scale(grid_values(4), n)
    with pytest.raises(ReversibilityError, match="not used up"):
        residue.check_undone_to()
    residue.unscale(scaled, n)
    residue.check_undone_to()


def test_check_undone_to_a_middle_point():
    residue = Residue()
    residue.scale(grid_values(40), numerators(40, 3.0))
    start = residue.clone(words=False)
    local = start.clone()
    x, n = grid_values(40), numerators(40, 3.0)
    scaled = local.scale(x, n)
    with pytest.raises(ReversibilityError, match="not used up"):
        local.check_undone_to(start)
    assert torch.equal(local.unscale(scaled, n), x)
    local.check_undone_to(start)
    with pytest.raises(ReversibilityError, match="not used up"):
        local.check_undone_to()  # the start itself was not empty


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (256.0, "layer 3: the stream reached 1 times"),
        (-1024.0, "layer 3: the stream reached 4 times"),
        (math.inf, "layer 3: the stream is not finite"),
        (math.nan, "layer 3: the stream is not finite"),
    ],
)
def test_leaving_the_grid_names_the_first_layer(value, message):
    residue = Residue()
    residue.watch("layer 2", torch.tensor([255.9, -255.9]))
    residue.watch("layer 3", torch.tensor([1.0, value]))
    residue.watch("layer 4", torch.tensor([1e9]))
    with pytest.raises(ReversibilityError, match=message):
        residue.check_range()


def test_range_of_each_dtype():
    residue = Residue()
    residue.watch("a", torch.tensor([255.99999]))
    residue.watch("b", torch.tensor([16383.9999], dtype=torch.float64))
    residue.watch("c", torch.zeros(0))
    residue.check_range()
    residue.watch("d", torch.tensor([16384.0], dtype=torch.float64))
    with pytest.raises(ReversibilityError, match=r"^d: "):
        residue.check_range()
    residue.check_range()  # a note is judged once


# Copies


def test_a_copy_may_keep_no_words():
    residue = Residue()
    residue.scale(grid_values(30), numerators(30, 3.0))
    copies = [residue.clone(words=False, keep=keep) for keep in (True, False)]
    for _ in range(20):
        x, n = grid_values(30), numerators(30, 3.0)
        results = [copy.scale(x, n) for copy in copies]
        assert torch.equal(*results)
    assert [copy._word_bits() > 0 for copy in copies] == [True, False]
    for one, other in zip(*(copy._pools.values() for copy in copies), strict=True):
        assert torch.equal(one.value, other.value)
        assert torch.equal(one.level, other.level)


@pytest.mark.parametrize("words", [True, False])
def test_clone_is_independent(words):
    residue = Residue()
    tape = []
    for _ in range(10):
        x, n = grid_values(30), numerators(30, 3.0)
        tape.append((x, n, residue.scale(x, n)))
    before = [t.clone() for t in residue.tensors()]
    other = residue.clone(words=words)
    x, n = grid_values(30), numerators(30, 3.0)
    scaled = other.scale(x, n)
    assert torch.equal(other.unscale(scaled, n), x)
    other.scale(x, n)
    for now, then in zip(residue.tensors(), before, strict=True):
        assert torch.equal(now, then)
    if words:
        other = residue.clone()
        for x, n, scaled in reversed(tape):
            assert torch.equal(other.unscale(scaled, n), x)
    for now, then in zip(residue.tensors(), before, strict=True):
        assert torch.equal(now, then)
    for x, n, scaled in reversed(tape):
        assert torch.equal(residue.unscale(scaled, n), x)


def test_unpack_restores_and_leaves_the_packed_tensors_alone():
    residue = Residue()
    tape = []
    for size in (30, 7, 30, 30):
        x, n = grid_values(size), numerators(size, 4.0)
        tape.append((x, n, residue.scale(x, n)))
    layout, tensors = residue.layout(), residue.tensors()
    before = [t.clone() for t in tensors]
    for _ in range(2):  # as retain_graph=True does
        again = Residue.unpack(layout, tensors)
        assert again.bits == residue.bits
        for x, n, scaled in reversed(tape):
            assert torch.equal(again.unscale(scaled, n), x)
        again.check_undone_to()
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now, then)
    assert Residue.unpack(Residue().layout(), Residue().tensors()).bits == 0
