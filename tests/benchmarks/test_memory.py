from functools import partial

import pytest

from benchmarks import memory
from benchmarks.memory import marginal_mb, predictions_mb, residue_mb, state_gradients_mb, states_mb, training_peak
from benchmarks.training import Variant
from crevnet.model import CrevNetConfig

pytestmark = pytest.mark.usefixtures("single_thread")

SMALL = {"image_size": 16, "blocks": (1, 1, 1), "modules": 2, "clip": 2}


@pytest.mark.parametrize(("cell", "tensors"), [("stlstm", 18 * 16 + 19 * 8 + 1), ("convlstm", 18 * 16 + 1)])
def test_states_are_those_of_every_step_and_one_tensor_of_zeros(cell, tensors):
    assert states_mb(CrevNetConfig(cell=cell), steps=19) == pytest.approx(tensors * 6144 * 4 / 1e6)


@pytest.mark.parametrize(("cell", "tensors"), [("stlstm", 1 + 2 * 17 + 4 * 24), ("convlstm", 1 + 2 * 16 + 4 * 16)])
def test_states_kept_every_fourth_step_are_segment_starts_and_one_segment(cell, tensors):
    config = CrevNetConfig(cell=cell, keep_states_every=4)
    assert states_mb(config, steps=19) == pytest.approx(tensors * 6144 * 4 / 1e6)


@pytest.mark.parametrize(("cell", "tensors"), [("stlstm", 18 * 8 + 19 * 8 + 2 + 8), ("convlstm", 18 * 8 + 2 + 8)])
def test_inverted_cells_are_the_last_ones_and_one_tensor_of_zeros(cell, tensors):
    config = CrevNetConfig(cell=cell, cell_states="inverted")
    assert states_mb(config, steps=19) == pytest.approx(tensors * 6144 * 4 / 1e6)


def test_inverted_cells_of_a_segment_are_those_before_and_behind_it():
    config = CrevNetConfig(cell="convlstm", cell_states="inverted", keep_states_every=4)
    assert states_mb(config, steps=19) == pytest.approx((2 + 3 * 16 + 3 * 8 + 2 * 8) * 6144 * 4 / 1e6)


def test_flops_of_a_reversible_step_are_four_thirds_and_of_inverted_cells_no_more(monkeypatch):
    monkeypatch.setattr(memory, "CrevNetConfig", partial(CrevNetConfig, **SMALL))
    stored, reversible, inverted = (
        memory.flops.__wrapped__("stlstm", variant, 3)
        for variant in (Variant("stored"), Variant("reversible"), Variant("reversible", cell_states="inverted"))
    )
    assert reversible == inverted
    # Of the input's gradient, which nobody wants, neither side has the operations.
    assert 4 / 3 <= reversible / stored < 1.36


def test_state_gradients_are_those_of_one_step():
    assert state_gradients_mb(CrevNetConfig(cell="stlstm")) == pytest.approx(17 * 6144 * 4 / 1e6)
    assert state_gradients_mb(CrevNetConfig(cell="convlstm")) == pytest.approx(16 * 6144 * 4 / 1e6)


def test_predictions_count_with_their_gradients():
    assert predictions_mb(CrevNetConfig(), steps=19) == pytest.approx(2 * 19 * 3 * 64 * 64 * 4 / 1e6)


def test_residue_is_at_least_the_reservoirs_and_none_in_float():
    elements = 2 * 16 * 16 // 2
    assert residue_mb(CrevNetConfig(**SMALL), steps=3) >= elements * 10 / 1e6
    assert residue_mb(CrevNetConfig(**SMALL, arithmetic="float"), steps=3) == 0


def test_peaks_are_the_same_every_time():
    training_peak(CrevNetConfig(**SMALL), 1, steps=1)
    first, second = (training_peak(CrevNetConfig(**SMALL), 1, steps=3) for _ in range(2))
    assert first == second


def test_a_sample_takes_more_where_more_is_stored():
    marginal = {
        variant: marginal_mb("stlstm", 1, (2, 2, 2), variant, steps=2)
        for variant in (Variant("reversible"), Variant("stored"))
    }
    assert 0 < 2 * marginal[Variant("reversible")] < marginal[Variant("stored")]
