"""What can be checked of training steps on a GPU without one."""

from types import SimpleNamespace

import torch

from benchmarks.gpu import test_training_step as steps
from benchmarks.gpu.test_training_step import replaying, ways_of_crevnet
from benchmarks.training import random_clips
from crevnet.model import CrevNetConfig


def test_a_graph_has_been_replayed_once_before_it_is_timed(monkeypatch):
    """Its first launch takes longer than the others."""
    replays, passes = [], []

    def captured(work):
        work()
        return SimpleNamespace(replay=lambda: replays.append(len(passes))), None

    monkeypatch.setattr(steps, "captured", captured)
    monkeypatch.setattr(steps, "step", lambda *_: passes.append(1))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
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
