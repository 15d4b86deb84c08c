"""Several time steps as one batch: the same predictions and gradients, in every mode."""

import copy

import pytest
import torch

from crevnet.at_once import apply_at_once
from crevnet.model import CrevNetConfig
from revgrad import AdditiveCoupling
from tests.crevnet.test_model import MODES, SCHEDULES, clips_for, make, train_once, twins, whole_error


def double(model):
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("together", [1, 2, 3, 7])
def test_the_chain_is_applied_to_every_time_step(together):
    chain = [AdditiveCoupling(torch.nn.Linear(3, 3)), AdditiveCoupling(torch.nn.Linear(3, 3), source=1, target=0)]
    streams = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    found = apply_at_once(chain, streams, together, arithmetic="float")
    for t in range(5):
        alone = apply_at_once(chain, tuple(x[t : t + 1] for x in streams), 1, arithmetic="float")
        for whole, one in zip(found, alone, strict=True):
            torch.testing.assert_close(whole[t], one[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("schedule", ["teacher forcing", *SCHEDULES])
def test_same_predictions_and_gradients_as_one_by_one(schedule, arithmetic, mode):
    given, fed, steps = SCHEDULES.get(schedule, (4, None, None))
    one_by_one = double(make(mode="stored", arithmetic=arithmetic))
    clips = clips_for(one_by_one, given).double()
    wanted, expected = train_once(one_by_one, clips, fed, steps)
    for together in (2, 3, 9):
        out, grads = train_once(twins(one_by_one, mode=mode, clips_at_once=together), clips, fed, steps)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
        assert whole_error(grads, expected) < 1e-10


def test_statistics_of_batch_normalisation_are_those_of_all_clips_together():
    model = make(norm="batch", clips_at_once=4)
    model(clips_for(model, 4))
    moved = [m.num_batches_tracked.item() for m in model.modules() if isinstance(m, torch.nn.BatchNorm3d)]
    assert set(moved) == {2}  # one batch to encode, one to decode


@pytest.mark.parametrize("wrong", [0, -1])
def test_at_least_one(wrong):
    with pytest.raises(ValueError, match="clips_at_once"):
        CrevNetConfig(clips_at_once=wrong)
