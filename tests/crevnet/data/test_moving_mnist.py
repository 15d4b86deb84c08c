import math
import pickle
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from crevnet.data import DigitImages, MovingMNIST

RANDOM = np.random.default_rng(0)
DIGITS = DigitImages(RANDOM.integers(1, 256, (6, 5, 5), np.uint8), np.arange(6, dtype=np.uint8), "noise")


@cache
def small(num_digits: int = 2, seed: int = 0, stream: int = 0, size: int = 2**40) -> MovingMNIST:
    return MovingMNIST(
        DIGITS,
        num_digits=num_digits,
        image_size=12,
        digit_size=5,
        frames=7,
        seed=seed,
        stream=stream,
        size=size,
    )


def film(dataset: MovingMNIST, index: int, images: np.ndarray) -> torch.Tensor:
    """Oracle: draw every number in order, step from frame to frame, and set pixel by pixel."""
    generator = np.random.Generator(np.random.Philox(key=dataset.seed + (dataset.stream << 64)))
    draws = [0.0] * dataset.num_digits * 5
    for _ in range(index + 1):
        draws = [generator.random() for _ in range(-(-len(draws) // 4) * 4)][: len(draws)]
    size, side = dataset.image_size, dataset.digit_size
    span = size - side
    video = torch.zeros(dataset.frames, 1, size, size)
    for k in range(dataset.num_digits):
        image, row, column, direction, pace = draws[5 * k : 5 * k + 5]
        glyph = images[int(image * len(images))]
        speed = dataset.speed[0] + pace * (dataset.speed[1] - dataset.speed[0])
        place = [row * span, column * span]
        step = [speed * math.sin(2 * math.pi * direction), speed * math.cos(2 * math.pi * direction)]
        for t in range(dataset.frames):
            top, left = round(place[0]), round(place[1])
            for y in range(side):
                for x in range(side):
                    value = torch.tensor(float(glyph[y, x])) / 255
                    pixel = video[t, 0, top + y, left + x]
                    video[t, 0, top + y, left + x] = max(pixel, value)
            for axis in (0, 1):
                place[axis] += step[axis]
                while not 0 <= place[axis] <= span:
                    place[axis] = 2 * span - place[axis] if place[axis] > span else -place[axis]
                    step[axis] = -step[axis]
    return video


@settings(max_examples=15, deadline=None)
@given(
    num_digits=st.integers(1, 4),
    margin=st.integers(1, 6),
    frames=st.integers(1, 8),
    speeds=st.tuples(st.floats(0, 9), st.floats(0, 9)).map(sorted).map(tuple),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2),
    index=st.integers(0, 9),
)
def test_equals_the_frame_by_frame_simulation(num_digits, margin, frames, speeds, seed, stream, index):
    dataset = MovingMNIST(
        DIGITS,
        num_digits=num_digits,
        image_size=5 + margin,
        digit_size=5,
        frames=frames,
        speed=speeds,
        seed=seed,
        stream=stream,
        size=10,
    )
    assert torch.equal(dataset[index], film(dataset, index, DIGITS.images))


@settings(deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(0, 2**40 - 1) | st.integers(0, 20), max_size=8))
def test_a_sequence_does_not_depend_on_its_batch(num_digits, indices):
    dataset = small(num_digits)
    batch = dataset.batch(indices)
    assert batch.shape == (len(indices), 7, 1, 12, 12)
    assert batch.dtype == torch.float32
    for index, sequence, item in zip(indices, batch, dataset.__getitems__(indices), strict=True):
        assert torch.equal(sequence, dataset[index])
        assert torch.equal(item, dataset[index])


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**64 - 1), st.integers(0, 2**30))
def test_pixels_are_grey_levels_and_every_frame_shows_the_digits(num_digits, seed, first):
    dataset = MovingMNIST(DIGITS, num_digits=num_digits, image_size=14, digit_size=5, frames=4, seed=seed, size=2**31)
    batch = dataset.batch(range(first, first + 5))
    levels = batch.double() * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    assert batch.min() >= 0
    assert batch.max() <= 1
    # The test digits have no black pixel: one of them lights 25, and all together at most 25 each.
    lit = (batch > 0).sum((-1, -2))
    assert lit.min() >= 25
    assert lit.max() <= 25 * num_digits


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**64 - 1), st.floats(0, 1e4))
def test_trajectories_stay_in_the_frame(num_digits, digit_size, seed, speed):
    dataset = MovingMNIST(
        DIGITS,
        num_digits=num_digits,
        image_size=12,
        digit_size=digit_size,
        frames=9,
        speed=(speed, speed),
        seed=seed,
        size=8,
    )
    image, row, column = dataset.trajectories(range(8))
    assert image.shape == (8, num_digits)
    assert row.shape == column.shape == (8, num_digits, 9)
    assert ((image >= 0) & (image < len(DIGITS))).all()
    for place in (row, column):
        assert ((place >= 0) & (place <= 12 - digit_size)).all()


def test_classic_speed_is_a_tenth_of_the_free_span():
    dataset = MovingMNIST(DIGITS, frames=2, size=4000)
    assert dataset.speed == pytest.approx((3.6, 3.6))
    _, row, column = dataset.trajectories(range(4000))
    steps = np.hypot(np.diff(row)[..., 0], np.diff(column)[..., 0])
    # Rounding moves each end by half a pixel at most in each direction; a bounce shortens a step.
    assert steps.max() <= 3.6 + 2**0.5
    assert np.median(steps) == pytest.approx(3.6, abs=0.2)


def test_starts_directions_and_digits_are_uniform():
    dataset = MovingMNIST(DIGITS, image_size=64, digit_size=4, frames=2, speed=(10, 10), size=8000)
    image, row, column = dataset.trajectories(range(8000))
    counts = np.bincount(image.ravel(), minlength=6)
    # Five standard deviations of a binomial count and, below, of means over 16,000 digits.
    assert (abs(counts - 16000 / 6) < 5 * (16000 * 5 / 36) ** 0.5).all()
    for place in (row, column):
        assert abs(place[..., 0].mean() - 30) < 5 * 60 / 12**0.5 / 16000**0.5
        assert abs(np.diff(place).mean()) < 5 * 10 / 2**0.5 / 16000**0.5


def test_seeds_and_streams_give_other_sequences():
    first = small().batch(range(20))
    for other in (small(seed=1), small(stream=1)):
        assert all(not torch.equal(a, b) for a, b in zip(first, other.batch(range(20)), strict=True))
    assert torch.equal(first[:5], small(size=5).batch(range(5)))


def test_digits_are_resized_to_digit_size():
    white = DigitImages(np.full((1, 8, 8), 255, np.uint8), np.zeros(1, np.uint8), "white")
    dataset = MovingMNIST(white, num_digits=1, image_size=20, digit_size=13, frames=3, size=2)
    assert (dataset.batch([0, 1]).sum((-1, -2)) == 13 * 13).all()


def test_digits_as_large_as_the_frame_stand_still():
    dataset = MovingMNIST(DIGITS, num_digits=1, image_size=5, digit_size=5, frames=3, size=3)
    image, _, _ = dataset.trajectories([2])
    expected = torch.from_numpy(DIGITS.images[image[0, 0]]) / 255
    assert (dataset[2] == expected).all()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_make_the_same_sequences(context):
    dataset = small(size=9)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=context)
    assert torch.equal(torch.cat(list(loader)), dataset.batch(range(9)))


def test_iteration_ends_and_pickling_keeps_the_sequences():
    dataset = small(size=3)
    assert len(dataset) == len(list(dataset)) == 3
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2], dataset[2])


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda indices: np.array(indices, np.uint8)])
def test_kinds_of_indices(kind):
    assert torch.equal(small().batch(kind([4, 1])), small().batch([4, 1]))


@pytest.mark.parametrize("indices", [[-1], [5], [0, 5], [2**70], [1.0], [True], [[1]], 3])
def test_bad_indices(indices):
    with pytest.raises(IndexError, match=r"is not in 0\.\.4|must be a flat list of integers"):
        small(size=5).batch(indices)


@pytest.mark.parametrize("index", [-1, 5])
def test_bad_index(index):
    with pytest.raises(IndexError, match=rf"index {index} is not in 0\.\.4"):
        small(size=5)[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_digits": 0}, "num_digits must be at least 1, got 0"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"size": 2**63}, "size must be at most"),
        ({"digit_size": 0}, "digit_size must be at least 1, got 0"),
        ({"digit_size": 65}, "digit_size 65 exceeds image_size 64; lower"),
        ({"seed": -1}, "seed must be 0 to"),
        ({"seed": 2**64}, "seed must be 0 to"),
        ({"stream": -1}, "stream must be 0 to"),
        ({"speed": (2.0, 1.0)}, "speed must be finite"),
        ({"speed": (-1.0, 1.0)}, "speed must be finite"),
        ({"speed": (1.0, float("inf"))}, "speed must be finite"),
        ({"speed": (float("nan"), 1.0)}, "speed must be finite"),
        (
            {"digits": DIGITS.take(np.empty(0, np.int64), "none")},
            r"digits \(none\) is empty; pass at least one",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MovingMNIST(**({"digits": DIGITS, "size": 1} | arguments))
