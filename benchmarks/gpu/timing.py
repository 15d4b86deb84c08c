"""Time on a CUDA device: calls over several sets of inputs, by events, as they are called and replayed from a graph.

What is called from Python one after the other may take the time that Python needs; a graph takes the time that the
device needs.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.timing import rotated
from crevnet.capture import captured

_BEYOND_CACHE = 3
"""By how much all sets of inputs together shall be larger than the last-level cache."""
_FEWEST_SETS = 2
_LEAST_SECONDS = 1e-3
"""How long a sample takes at least: the resolution of events is half a microsecond, a graph takes several to start."""

Call = Callable[[int], Any]
"""Does the work on the i-th set of inputs and returns what it has made."""


def sets_beyond_cache(bytes_per_call: int, cache_bytes: int) -> int:
    """How many sets of inputs to take in turn, so that none is still cached when its turn comes."""
    return max(_FEWEST_SETS, math.ceil(_BEYOND_CACHE * cache_bytes / max(1, bytes_per_call)))


def repetitions(seconds: float) -> int:
    """How often to repeat what takes so many seconds, for a sample that is long enough."""
    return max(1, math.ceil(_LEAST_SECONDS / max(seconds, 1e-6)))


def cache_bytes() -> int:
    """Size of the current device's last-level cache."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds of a piece of work until the device is done, and what it returns."""
    gc.collect()
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return time.perf_counter() - started, result


@dataclass(frozen=True)
class Samples:
    """Seconds per call of one variant, one number per round."""

    called: list[float]
    """One call after the other, from Python."""
    replayed: list[float]
    """From a CUDA graph."""


def measure(calls: Mapping[str, Call], sets: int, rounds: int) -> dict[str, Samples]:
    """Time variants in turns.

    Args:
        calls: What to time, by name; all must have been called once before. To be run in a `side_stream`.
        sets: Number of sets of inputs.
        rounds: How often every variant is timed.
    """
    prepared = {name: _Prepared(call, sets) for name, call in calls.items()}
    samples = {name: Samples([], []) for name in calls}
    for i in range(rounds + 1):
        for name in rotated(list(calls), i):
            called, replayed = prepared[name].called(), prepared[name].replayed()
            if i > 0:  # the first round is for warming up
                samples[name].called.append(called)
                samples[name].replayed.append(replayed)
    return samples


class _Prepared:
    """One variant with the graph of one pass over all sets."""

    def __init__(self, call: Call, sets: int) -> None:
        self._call, self._sets = call, sets
        self._pass()
        self._passes = repetitions(_seconds(self._pass, 1))
        self._replay = captured(self._pass)
        self._replay()
        self._replays = repetitions(_seconds(self._replay, 1))

    def called(self) -> float:
        return _seconds(self._pass, self._passes) / self._sets

    def replayed(self) -> float:
        return _seconds(self._replay, self._replays) / self._sets

    def _pass(self) -> None:
        # Results stay until the pass is over: else all calls would write to the same memory, which is then cached.
        made = [self._call(i) for i in range(self._sets)]
        del made


def _seconds(work: Callable[[], Any], times: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times
