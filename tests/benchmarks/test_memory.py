import weakref
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import memory
from benchmarks.memory import marginal_mb, predictions_mb, residue_mb, state_gradients_mb, states_mb, training_peak
from benchmarks.training import Variant, random_clips, training_step
from crevnet.model import CrevNetConfig
from crevnet.video_model import VideoConfig
from revgrad import Residue

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


def most_residue_mb(monkeypatch, config, steps):
    """The most that all residues of a training step hold, looked at whenever a predictive module has been evaluated."""
    alive, found, begin = weakref.WeakSet(), [], Residue.__init__

    def noted(self, **options):
        begin(self, **options)
        alive.add(self)

    def look(*_):
        pools = [pool for residue in alive for pool in residue._pools.values()]
        shared = {x.data_ptr(): x.nbytes for pool in pools for x in (pool.value, pool.level)}
        found.append(sum(shared.values()) + sum(residue._word_bits() / 8 for residue in alive))

    monkeypatch.setattr(Residue, "__init__", noted)
    torch.manual_seed(0)
    model, clips = config.build(), random_clips(config, 1, steps)
    for module in model.predictor:
        module.transform.register_forward_hook(look)
    training_step(model, clips)
    return max(found) / 1e6


@pytest.mark.parametrize(("every", "steps"), [(1, 8), (2, 8), (2, 9), (8, 16)])
def test_residue_is_what_a_training_step_holds(monkeypatch, every, steps):
    config = CrevNetConfig(**SMALL, keep_states_every=every)
    # Words are counted on all time steps, and taken to be spread over them evenly.
    expected = residue_mb(config, steps)
    assert most_residue_mb(monkeypatch, config, steps) == pytest.approx(expected, rel=0.03 if every > 1 else 1e-9)


class Sums(nn.Module):
    """A loss whose gradients take no memory where there are some to add them to: all elements have the same."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Parameter(torch.zeros(100_000)) for _ in range(2))

    def loss(self, clips):
        return (self.one.sum() + self.other.sum()) * clips.mean()


class SumsConfig(VideoConfig):
    def build(self):
        return Sums()


def test_gradients_of_weights_were_there_before():
    """Two of 400 kB each, which a first step would make."""
    assert 0 < training_peak(SumsConfig(image_size=8), 1, 1) < 1000


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
