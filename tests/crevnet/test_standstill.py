import math
import warnings

import pytest
import torch

from crevnet.clips import frames_to_clips
from crevnet.model import CrevNetConfig
from crevnet.standstill import PATIENCE, VANISHED, Standstill


def test_a_vanished_gradient_is_told_once_and_only_where_it_stays():
    standstill = Standstill()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3 * PATIENCE):
            vanished = step % PATIENCE != 0
            standstill.see(step, 1.0, 0.5 * VANISHED if vanished else 2 * VANISHED)
        standstill.see(step + 1, 0.0, 0.0)  # nothing is left to learn
        standstill.see(step + 2, math.nan, math.nan)
        for _ in range(PATIENCE - 1):
            standstill.see(step, 1.0, 0.0)
    with pytest.warns(RuntimeWarning, match=r"step 9: gradients have vanished .* lower optimiser.learning_rate"):
        standstill.see(9, 1.0, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        standstill.see(10, 1.0, 0.0)


def test_a_predictor_with_closed_gates_counts_and_one_that_learns_does_not():
    torch.manual_seed(0)
    model = CrevNetConfig(channels=1, image_size=8, blocks=(1, 1), modules=2, cell="convlstm").build()
    clips = frames_to_clips(torch.rand(2, 6, 1, 8, 8), model.config.clip, model.config.stacking)

    def ratio():
        model.zero_grad()
        loss = model.loss(clips)
        loss.backward()
        return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) / loss.detach())

    assert ratio() > 100 * VANISHED
    with torch.no_grad():
        for layer in model.predictor:
            layer.transform.attention[-1].bias.fill_(-40)
    assert ratio() < VANISHED
