"""Training batches by global step: the same ones for any number of processes, workers or restarts."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from crevnet.data.sequence_set import SequenceSet
from crevnet.data.worker_signals import interrupts_held_back, outlive_interrupts

_DEAD = "DataLoader worker (pid"
"""How PyTorch's errors about a worker that has ended begin."""


class WorkerDied(RuntimeError):  # noqa: N818
    """A worker process has ended by itself, or was ended."""


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Around all that is done while there are workers: PyTorch raises in the midst of whatever that is when one dies.

    Raises:
        WorkerDied: One has; says what may have been the reason.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        # Where a batch was just being handed over, the connection is what is found broken.
        if isinstance(error, RuntimeError) and not str(error).startswith(_DEAD):
            raise
        reason = str(error).strip().rstrip(".")
        raise WorkerDied(
            f"a worker process has ended: {reason}. The system ends processes when memory runs out: lower run.workers; "
            "0 generates without workers"
        ) from error


class StepSampler(Sampler[list[int]]):
    """The indices of one process's part of every global batch.

    Step s of W processes with global batch size B takes indices [s*B, (s+1)*B), and rank r the r-th of W
    equal parts of them, so W processes together see exactly the batches that one process would.

    Args:
        batch_size: sequences per step, all processes together.
        start_step: first step to yield, to resume a run.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes; must divide `batch_size`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if batch_size % world_size:
            raise ValueError(
                f"batch_size {batch_size} cannot be divided among {world_size} processes; "
                f"make it a multiple of world_size, such as {-(-batch_size // world_size) * world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0 to {world_size - 1} (world_size - 1), got {rank}")
        if start_step < 0:
            raise ValueError(f"start_step must be at least 0, got {start_step}")
        self.batch_size = batch_size
        self.start_step = start_step
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world_size
        for step in itertools.count(self.start_step):
            first = step * self.batch_size + self.rank * share
            yield list(range(first, first + share))


def train_batches(
    dataset: SequenceSet,
    batch_size: int,
    *,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[Tensor]:
    """Iterate without end over one process's training batches; the other arguments are those of `StepSampler`.

    The batches do not depend on `workers`, and drawing them leaves torch's global generator alone. Workers ignore
    SIGINT and SIGTERM from their start; they end when the iterator does, and when the process that made it does,
    however that ends.

    Args:
        dataset: the sequences.
        batch_size: sequences per step, all processes together.
        start_step: first step.
        rank: this process.
        world_size: number of processes.
        workers: worker processes that generate ahead; 0 generates in this process.

    Returns:
        An iterator over float32 [batch_size / world_size, T, C, H, W] in [0, 1].

    Raises:
        ValueError: an argument is out of range.
        IndexError: (while iterating) the sequences have run out.
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    sampler = StepSampler(batch_size, start_step=start_step, rank=rank, world_size=world_size)
    if workers == 0:
        return map(dataset.batch, sampler)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=torch.stack,
        worker_init_fn=outlive_interrupts,
        # Without one of its own the loader draws its workers' seed from the global generator, and dropout
        # would then depend on whether there are workers.
        generator=torch.Generator(),
    )
    with interrupts_held_back():
        return iter(loader)
