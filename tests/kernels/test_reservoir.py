import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from revgrad_kernels import (
    exact_weighted_sum,
    exact_weighted_sum_inverse,
    exact_weighted_sum_refill,
    forget,
    level_costs,
    recall,
    reservoir,
)
from torch._subclasses.fake_tensor import FakeTensorMode

BITS = 16


def literal_forget(value, numerator, reservoir, bits):
    """The module docstring, in Python's unbounded integers."""
    digit, rest = reservoir % numerator, reservoir // numerator
    product = value * numerator + digit
    return product // 2**bits, rest * 2**bits + product % 2**bits


def literal_recall(scaled, numerator, reservoir, bits):
    product = scaled * 2**bits + reservoir % 2**bits
    return product // numerator, reservoir // 2**bits * numerator + product % numerator


def triples(bits, room=0):
    """Values, numerators and reservoirs of the whole permitted range, its ends included."""
    top = 2 ** (63 - bits) - 1
    return st.lists(
        st.tuples(
            st.integers(-top, top) | st.sampled_from([-top, -1, 0, 1, top]),
            st.integers(1, 2**bits) | st.sampled_from([1, 2, 2**bits - 1, 2**bits]),
            st.integers(0, 2 ** (62 - bits) - 1) | st.sampled_from([0, 2 ** (62 - bits) - 1]),
        ),
        min_size=1,
        max_size=50,
    )


def tensors(cases):
    return (torch.tensor(column) for column in zip(*cases, strict=True))


@pytest.mark.parametrize("bits", [3, 8, BITS])
@given(data=st.data())
def test_forget_is_the_literal_oracle_and_recall_undoes_it(bits, data):
    cases = data.draw(triples(bits))
    value, numerator, reservoir = tensors(cases)
    scaled, after = forget(value, numerator, reservoir, bits)
    expected = [literal_forget(*case, bits) for case in cases]
    assert list(zip(scaled.tolist(), after.tolist(), strict=True)) == expected
    back, before = recall(scaled, numerator, after, bits)
    assert torch.equal(back, value)
    assert torch.equal(before, reservoir)


@given(data=st.data())
def test_recall_is_the_literal_oracle_and_forget_undoes_it(data):
    # Not only what forget produced: recall is one to one on all pairs.
    cases = data.draw(
        st.lists(
            st.tuples(st.integers(-(2**40), 2**40), st.integers(1, 2**BITS), st.integers(0, 2**45)),
            min_size=1,
            max_size=50,
        )
    )
    scaled, numerator, reservoir = tensors(cases)
    value, before = recall(scaled, numerator, reservoir, BITS)
    assert list(zip(value.tolist(), before.tolist(), strict=True)) == [literal_recall(*c, BITS) for c in cases]
    again, after = forget(value, numerator, before, BITS)
    assert torch.equal(again, scaled)
    assert torch.equal(after, reservoir)


def test_all_pairs_of_a_small_range_stay_apart():
    bits, numerator = 3, 5
    value, reservoir = (t.flatten() for t in torch.meshgrid(torch.arange(-20, 20), torch.arange(40), indexing="ij"))
    scaled, after = forget(value, torch.full_like(value, numerator), reservoir, bits)
    assert len(set(zip(scaled.tolist(), after.tolist(), strict=True))) == len(value)


@given(data=st.data())
def test_scaled_value_is_less_than_one_unit_off(data):
    cases = data.draw(triples(BITS))
    value, numerator, reservoir = tensors(cases)
    scaled, _ = forget(value, numerator, reservoir, BITS)
    for (x, n, _), found in zip(cases, scaled.tolist(), strict=True):
        assert abs(found * 2**BITS - x * n) < 2**BITS


def test_open_gate_changes_nothing():
    value, reservoir = torch.arange(-5, 5), torch.arange(10) * 7919
    one = torch.full_like(value, 2**BITS)
    scaled, after = forget(value, one, reservoir, BITS)
    assert torch.equal(scaled, value)
    assert torch.equal(after, reservoir)


def test_inputs_are_left_alone():
    value, numerator, reservoir = torch.arange(4), torch.full((4,), 77), torch.arange(4) * 1000
    kept = [t.clone() for t in (value, numerator, reservoir)]
    recall(*forget(value, numerator, reservoir, BITS)[:1], numerator, reservoir, BITS)
    for now, then in zip((value, numerator, reservoir), kept, strict=True):
        assert torch.equal(now, then)


def test_costs_cover_the_bits_forgotten_and_little_more():
    table = level_costs(torch.device("cpu"))
    bits = BITS - torch.log2(torch.arange(1, 2**BITS + 1).double())
    assert table.dtype == torch.int16
    assert (table[1:] >= 512 * bits).all()
    assert (table[1:] <= 512 * bits + 1.05).all()
    assert (table[1], table[-1]) == (16 * 512, 0)


def test_costs_are_kept_from_whoever_is_the_first_to_ask():
    expected = level_costs(torch.device("cpu")).clone()
    for mode in (torch.device("meta"), torch.inference_mode(), FakeTensorMode()):
        reservoir._kept_costs.cache_clear()
        with mode:
            found = level_costs(torch.device("cpu"))
        assert torch.equal(found, expected)
        assert not found.is_inference()


def test_the_compiler_is_not_imported_with_the_operators():
    code = "import sys, revgrad_kernels; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TRITON_INTERPRET": "0"})


def test_costs_are_a_constant_of_what_is_compiled():
    reservoir._kept_costs.cache_clear()
    compiled = torch.compile(lambda x: x + level_costs(x.device)[1], backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert compiled(torch.zeros(1)).item() == 16 * 512
        assert level_costs(torch.device("cpu")) is level_costs(torch.device("cpu"))


def test_dtypes_of_what_is_forgotten_are_named():
    x = torch.zeros(2, 3)
    reservoir, level, word = (torch.zeros(6, dtype=dtype) for dtype in (torch.int64, torch.int16, torch.int16))
    flat = {"reservoir": reservoir, "level": level, "costs": level_costs(x.device)}
    for name, t in flat.items():
        with pytest.raises(ValueError, match=rf"exact_weighted_sum: {name} must be {t.dtype}, not torch\.int32"):
            exact_weighted_sum(x, x, x, **flat | {name: t.int()})
    with pytest.raises(ValueError, match=r"exact_weighted_sum_refill: level must be torch\.int16, not torch\.int32"):
        exact_weighted_sum_refill(x, x, level.int(), flat["costs"])
    flat = {"reservoir": reservoir, "word": word, "refill": level > 0}
    for name, t in flat.items():
        with pytest.raises(
            ValueError, match=rf"exact_weighted_sum_inverse: {name} must be {t.dtype}, not torch\.int32"
        ):
            exact_weighted_sum_inverse(x, x, x, **flat | {name: t.int()})
