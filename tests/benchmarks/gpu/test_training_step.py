"""What can be checked of training steps on a GPU without one."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.gpu import test_training_step as steps
from benchmarks.gpu.test_training_step import PATCH, lay_out, replaying, ways_of_crevnet
from benchmarks.table1 import PATCHED, SYSTEMS
from benchmarks.training import CELLS, random_clips
from crevnet.model import CrevNetConfig


def test_a_graph_has_been_replayed_once_before_it_is_timed(monkeypatch):
    """Its first launch takes longer than the others."""
    replays, passes = [], []

    def captured(work):
        work()
        return lambda: replays.append(len(passes))

    monkeypatch.setattr(steps, "captured", captured)
    monkeypatch.setattr(steps, "step", lambda *_: passes.append(1))
    config = CrevNetConfig(image_size=8, blocks=(1,), modules=1, clip=1)
    replay, _ = replaying(config.build(), random_clips(config, 1, 1), "float32")
    assert replays == [len(passes)]  # after the capture, and once
    replay()
    assert replays == [len(passes)] * 2


def test_a_row_replaces_no_other_than_its_own_of_earlier(monkeypatch):
    """Rows of earlier commands are replaced by those that have the same keys."""
    keys = []
    monkeypatch.setattr(steps, "joined", lambda name, table, rows, columns, _: keys.append(columns) or rows)
    ways = ways_of_crevnet()
    rows = [steps.row("CrevNet", 1, way, [], []) for way in ways]
    steps.report("stlstm", rows)
    (columns,) = keys
    assert len({tuple(row[key] for key in columns) for row in rows}) == len(ways)


@pytest.mark.parametrize(
    "config",
    [
        *(CrevNetConfig(cell=cell) for cell in CELLS),
        *(replace(s.config, patch=PATCH) for s in SYSTEMS if s.name in PATCHED),
    ],
    ids=lambda config: config.name,
)
def test_weights_have_the_layout_that_their_row_says(config):
    """All of those whose layouts differ: weights of one input channel or one pixel have both at once."""
    with torch.device("meta"):
        model = config.build()
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]
    several = [w for w in weights if w.shape[1] > 1 and w[0, 0].numel() > 1]
    assert several
    for _ in range(2):  # the ways take turns
        lay_out(model, "channels-last")
        assert all(w.is_contiguous(memory_format=formats[w.ndim]) for w in weights)
        assert not any(w.is_contiguous() for w in several)
        lay_out(model, "contiguous")
        assert all(w.is_contiguous() for w in weights)
