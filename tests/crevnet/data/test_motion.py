import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crevnet.data.motion import bouncing_pixels, fold


def simulate(start: float, velocity: float, frames: int, span: float) -> list[float]:
    """Oracle: one frame after the other, turning round at every wall that is met on the way."""
    path, position = [], start
    for _ in range(frames):
        path.append(position)
        position += velocity
        while not 0 <= position <= span:
            position = 2 * span - position if position > span else -position
            velocity = -velocity
    return path


@settings(deadline=None)
@given(
    span=st.integers(1, 60),
    part=st.floats(0, 1),
    velocity=st.floats(-200, 200),
    frames=st.integers(1, 30),
)
def test_closed_form_equals_simulation(span, part, velocity, frames):
    start = part * span
    free = start + velocity * np.arange(frames)
    assert fold(free, span) == pytest.approx(simulate(start, velocity, frames, span), abs=1e-8)


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(1e-3, 1e3))
def test_folded_positions_are_in_bounds_and_periodic(positions, span):
    folded = fold(np.array(positions), span)
    assert (folded >= 0).all()
    assert (folded <= span).all()
    assert fold(-np.array(positions), span) == pytest.approx(folded, abs=1e-6)


def test_known_path():
    path = bouncing_pixels(np.array([3.0]), np.array([2.0]), 8, 5)
    assert path.tolist() == [[3, 5, 3, 1, 1, 3, 5, 3]]


def test_no_room_means_no_motion():
    assert bouncing_pixels(np.zeros(2), np.array([0.0, 4.0]), 3, 0).tolist() == [[0, 0, 0], [0, 0, 0]]


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 25), st.integers(0, 2**32 - 1))
def test_pixels_are_the_rounded_positions(span, frames, seed):
    random = np.random.default_rng(seed)
    start, velocity = random.random((3, 2)) * span, random.normal(size=(3, 2)) * 5
    pixels = bouncing_pixels(start, velocity, frames, span)
    assert pixels.shape == (3, 2, frames)
    assert pixels.dtype == np.int64
    assert pixels.min() >= 0
    assert pixels.max() <= span
    for i, k, t in np.ndindex(pixels.shape):
        assert pixels[i, k, t] == round(float(fold(start[i, k] + velocity[i, k] * np.float64(t), span)))
