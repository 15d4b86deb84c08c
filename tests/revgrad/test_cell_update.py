"""The update of a cell on its own: what it loses, and what brings it back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from revgrad import (
    Residue,
    ReversibilityError,
    snap,
    update_cell,
)
from revgrad.cell import CellMerge, CellRecall
from revgrad.gradients import gradients
from revgrad.residue import entropy_bits

pytestmark = pytest.mark.usefixtures("single_thread")


def cell_tensors(shape, dtype=torch.float32, scale=4.0):
    """Cell, decay and increment."""
    cell, decay, increment = (torch.randn(shape, dtype=torch.float64).mul(scale).to(dtype) for _ in range(3))
    return snap(cell), decay, increment


def merged(residue, cell, decay, increment):
    update = CellMerge("layer", residue, cell)
    return update(update.stand_in, decay, increment)


def recovered(residue, new, decay, increment):
    update = CellRecall("layer", residue, new)
    assert torch.equal(update(update.stand_in, decay, increment), new)
    return update.recover()


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    steps=st.integers(1, 30),
    seed=st.integers(0, 2**16),
)
def test_recovered_bit_for_bit_over_many_steps(shape, dtype, scale, steps, seed):
    torch.manual_seed(seed)
    residue, cells, given_ = Residue(), [snap(torch.randn(shape, dtype=dtype))], []
    with torch.no_grad():
        for _ in range(steps):
            _, decay, increment = cell_tensors(shape, dtype, scale)
            increment = torch.tanh(increment)
            given_.append((decay, increment))
            cells.append(merged(residue, cells[-1], decay, increment))
        found = cells[-1]
        for before, inputs in zip(reversed(cells[:-1]), reversed(given_), strict=True):
            found = recovered(residue, found, *inputs)
            assert torch.equal(found, before)
    residue.check_undone_to()
    residue.check_range()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_off_the_float_update_by_rounding_alone(dtype):
    cell, decay, increment = cell_tensors((1000,), dtype)
    wanted = update_cell(cell.double(), decay.double(), increment.double())
    found = merged(Residue(), cell, decay, increment).double()
    # The gate is rounded to 2^-16, and never to zero; the increment and the product to the grid.
    step = 2.0**-16 if dtype == torch.float32 else 2.0**-32
    assert ((found - wanted).abs() <= 2.0**-16 * cell.abs() + 2 * step).all()


def test_bits_are_the_entropy_of_the_forget_gate():
    residue, bits, cell, steps = Residue(), 0.0, snap(torch.randn(500)), 40
    with torch.no_grad():
        for _ in range(steps):
            decay = torch.randn(500).mul_(2)
            bits += entropy_bits((torch.sigmoid(decay) * 2**16).round().clamp(1))
            cell = merged(residue, cell, decay, torch.randn(500))
    # Levels are counted in steps of 1/512 bit, rounded up.
    assert bits <= residue.used_bits <= bits + 500 * steps * 1.1 / 512


@pytest.mark.parametrize("decay", [-200.0, -12.0, 0.0, 12.0, 200.0])
def test_extreme_gates(decay):
    cell, decay, increment = snap(torch.randn(50)), torch.full((50,), decay), torch.randn(50)
    residue = Residue()
    with torch.no_grad():
        new = merged(residue, cell, decay, increment)
        torch.testing.assert_close(new, update_cell(cell, decay, increment), rtol=0, atol=2e-4)
        assert torch.equal(recovered(residue, new, decay, increment), cell)
    assert math.isclose(residue.used_bits, 0.0)


def test_gradient_passes_straight_through_the_rounding():
    leaves = [x.requires_grad_() for x in cell_tensors((200,), torch.float64, scale=1.0)]
    cell, decay, _ = leaves
    weight = torch.randn(200, dtype=torch.float64)
    found = torch.autograd.grad((merged(Residue(), *leaves) * weight).sum(), leaves)
    gate = torch.sigmoid(decay)
    rounded = (gate * 2**16).round() / 2**16
    torch.testing.assert_close(found[0], weight * rounded, rtol=0, atol=0)
    torch.testing.assert_close(found[1], weight * cell * gate * (1 - gate))
    assert torch.equal(found[2], weight)


def test_gradient_of_a_cell_that_is_recovered_is_that_of_one_that_is_stored():
    leaves = [x.requires_grad_() for x in cell_tensors((50,), scale=1.0)]
    weight, residue = torch.randn(50), Residue()
    new = merged(residue, *leaves)
    expected = torch.autograd.grad(new, leaves, weight)
    update = CellRecall("layer", residue, new.detach())
    out = update(update.stand_in, *leaves[1:])
    assert torch.equal(update.recover(), leaves[0])
    assert all(map(torch.equal, gradients((out,), (weight,), (update.stand_in, *leaves[1:])), expected))


def test_a_gate_that_is_not_a_number():
    cell, decay, increment = cell_tensors((4,))
    residue = Residue(keep=False)
    decay[2] = math.nan
    with torch.no_grad():
        assert merged(residue, cell, decay, increment).isnan().tolist() == [False, False, True, False]
    with pytest.raises(ReversibilityError, match="is not finite"):
        residue.check_range()
