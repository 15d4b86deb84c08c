import os
import signal
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crevnet.data import DigitImages, MovingMNIST, StepSampler, WorkerDied, train_batches, worker_deaths

DIGITS = DigitImages(
    np.random.default_rng(0).integers(1, 256, (6, 5, 5), np.uint8), np.arange(6, dtype=np.uint8), "noise"
)


def dataset(size: int = 2**40) -> MovingMNIST:
    return MovingMNIST(DIGITS, image_size=12, digit_size=5, frames=3, size=size)


def first(count, iterable):
    return list(islice(iterable, count))


@settings(deadline=None)
@given(
    share=st.integers(1, 5),
    world_size=st.integers(1, 5),
    start=st.integers(0, 2**33),
    count=st.integers(0, 6),
)
def test_ranks_together_see_the_batches_of_one_process(share, world_size, start, count):
    batch_size = share * world_size
    alone = first(count, StepSampler(batch_size, start_step=start))
    ranks = [
        first(count, StepSampler(batch_size, start_step=start, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert alone == [list(range(s * batch_size, (s + 1) * batch_size)) for s in range(start, start + count)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == alone


@settings(deadline=None)
@given(st.integers(0, 10), st.integers(0, 10))
def test_resuming_continues_where_the_run_stopped(stop, more):
    whole = first(stop + more, StepSampler(4))
    assert whole == first(stop, StepSampler(4)) + first(more, StepSampler(4, start_step=stop))


def test_each_iteration_starts_over():
    sampler = StepSampler(2, start_step=3)
    for _ in range(2):
        assert first(2, sampler) == [[6, 7], [8, 9]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_dataset(workers):
    data = dataset()
    batches = first(3, train_batches(data, 4, start_step=5, rank=1, world_size=2, workers=workers))
    assert torch.equal(torch.stack(batches), torch.stack([data.batch([4 * s + 2, 4 * s + 3]) for s in (5, 6, 7)]))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generator_is_left_alone(workers):
    before = torch.get_rng_state()
    first(1, train_batches(dataset(), 2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_worker_that_is_killed_is_told():
    batches = train_batches(dataset(), 2, workers=1)

    def take_them():
        try:
            with worker_deaths():
                next(batches)
                os.kill(batches._workers[0].pid, signal.SIGKILL)
                list(batches)
        finally:
            batches._shutdown_workers()  # else every process that ends later raises the same again

    with pytest.raises(WorkerDied, match=r"a worker process has ended: .* lower run\.workers"):
        take_them()


@pytest.mark.parametrize("error", [RuntimeError("other"), FileNotFoundError("a file")])
def test_another_error_beside_workers_is_passed_on(error):
    with pytest.raises(type(error)) as caught, worker_deaths():
        raise error
    assert caught.value is error


def test_running_out_of_sequences_is_an_error():
    batches = train_batches(dataset(size=3), 2)
    next(batches)
    with pytest.raises(IndexError, match=r"index 3 is not in 0\.\.2"):
        next(batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 4, "world_size": 0}, "world_size must be at least 1"),
        (
            {"batch_size": 4, "world_size": 3},
            "batch_size 4 cannot be divided among 3 processes; .* such as 6",
        ),
        ({"batch_size": 4, "world_size": 2, "rank": 2}, "rank must be 0 to 1"),
        ({"batch_size": 4, "rank": -1}, "rank must be 0 to 0"),
        ({"batch_size": 4, "start_step": -1}, "start_step must be at least 0"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_batch(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepSampler(**arguments)
    with pytest.raises(ValueError, match=message):
        train_batches(dataset(), **arguments)


def test_negative_workers():
    with pytest.raises(ValueError, match="workers must be at least 0"):
        train_batches(dataset(), 2, workers=-1)
