"""What can be checked of captures without a GPU."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from crevnet import capture
from crevnet.capture import captured, side_stream


@pytest.fixture
def streams(monkeypatch):
    """The streams that were made, and those that were current one after the other."""
    found = SimpleNamespace(made=[], current=[])

    def make(device):
        found.made.append(device)
        return Mock()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: found.current.append(stream) or nullcontext())
    capture._stream_beside.cache_clear()
    yield found
    capture._stream_beside.cache_clear()


def test_there_is_one_stream_for_every_device(streams):
    """Libraries keep memory for every stream that they are used on."""
    devices = [torch.device("cuda", i) for i in (0, 1)]
    for device in (None, *devices, None):
        with side_stream(device):
            pass
    assert streams.made == devices
    assert streams.current == [streams.current[i] for i in (0, 0, 2, 0)]
    assert streams.current[0] is not streams.current[2]


def test_on_a_cpu_nothing_is_done(streams):
    with side_stream(torch.device("cpu")):
        pass
    assert not streams.made


def test_a_replay_returns_what_the_capture_has_made(monkeypatch):
    calls = []

    @contextmanager
    def recording(graph, stream):
        calls.append((graph, stream))
        yield

    graph = SimpleNamespace(replay=lambda: calls.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "side")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("peak"))
    made = object()
    replay = captured(lambda: calls.append("work") or made)
    assert calls == ["peak", (graph, "side"), "work"]
    assert replay() is made
    assert calls[3:] == ["replay"]
