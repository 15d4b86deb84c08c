"""How time is taken: in turns, in rounds, with nothing collected meanwhile; on a CPU. For a GPU see `gpu/timing.py`."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

FEWEST = 3
"""Rounds that are taken however long they are, and values below which percentiles do not say how far they scatter."""


def rotated(names: Sequence[T], round_number: int) -> list[T]:
    """Another one first in every round."""
    shift = round_number % max(1, len(names))
    return [*names[shift:], *names[:shift]]


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """One ratio per round, so that what slows the machine down for a while slows both."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


@contextmanager
def no_collector() -> Iterator[None]:
    """Collects what has lately become garbage and turns the cycle collector off: then, whatever is freed is freed
    because nothing refers to it, and no step is longer by chance.
    """
    gc.collect(1)  # of all that there is it would take longer than some steps
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def processor_seconds(work: Callable[[], Any]) -> float:
    """Processor time of a piece of work, of all threads."""
    with no_collector():
        start = time.process_time()
        work()
        return time.process_time() - start


def rounds_within(run_round: Callable[[int], T], seconds: float, most: int) -> list[T]:
    """What as many rounds yield as fit into so many seconds: at least `FEWEST`, at most so many; by their number."""
    start, rounds = time.perf_counter(), list[T]()
    while len(rounds) < most:
        rounds.append(run_round(len(rounds)))
        taken = time.perf_counter() - start
        if len(rounds) >= FEWEST and taken + taken / len(rounds) > seconds:
            break
    return rounds
