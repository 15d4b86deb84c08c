"""CUDA graphs of whatever is called: the stream they are captured on, and the capture. Not yet run on a GPU."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

Made = TypeVar("Made")


def captured(work: Callable[[], Made]) -> Callable[[], Made]:
    """Capture a piece of work that has run before.

    The current stream must be another one than the default (see `side_stream`). The peak of memory begins anew.

    Returns:
        The replay. It returns what the work has made, which every replay overwrites.
    """
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # a graph that is collected while another one is captured ends the capture
    torch.cuda.reset_peak_memory_stats()  # kernels have been tuned before, for which Triton takes memory
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        made = work()

    def replay() -> Made:
        graph.replay()
        return made

    return replay


@contextmanager
def side_stream(device: torch.device | None = None) -> Iterator[None]:
    """A stream beside the default one: that one cannot be captured, and autograd runs a backward pass where its forward
    pass ran. Does nothing on a device that is not CUDA; by default on the current CUDA device.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type != "cuda":
        yield
        return
    stream = _stream_beside(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """The same every time: what cuBLAS takes for work on a stream, it keeps, and that would count as memory of whatever
    is the first to run on a new one.
    """
    return torch.cuda.Stream(device)
