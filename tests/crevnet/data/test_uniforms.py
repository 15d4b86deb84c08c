import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from crevnet.data.uniforms import indexed_uniforms


def in_order(count: int, draws: int, seed: int, stream: int) -> np.ndarray:
    """Oracle: draw from the generator one number after the other, never skipping."""
    generator = np.random.Generator(np.random.Philox(key=seed + (stream << 64)))
    width = (draws + 3) // 4 * 4
    return np.array([[generator.random() for _ in range(width)] for _ in range(count)])[:, :draws]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 30), max_size=20),
    st.integers(1, 13),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
)
def test_any_indices_equal_drawing_in_order(indices, draws, seed, stream):
    table = indexed_uniforms(np.array(indices, np.int64), draws, seed=seed, stream=stream)
    assert table.shape == (len(indices), draws)
    assert (table == in_order(31, draws, seed, stream)[indices]).all()


@settings(deadline=None)
@given(st.integers(2**62 - 50, 2**62), st.integers(1, 50))
def test_runs_equal_single_rows_far_out(first, count):
    indices = np.arange(first, first + count)
    whole = indexed_uniforms(indices, 10, seed=1, stream=2)
    rows = [indexed_uniforms(indices[i : i + 1], 10, seed=1, stream=2) for i in range(count)]
    assert (whole == np.concatenate(rows)).all()


def test_rows_seeds_and_streams_all_differ():
    indices = np.arange(100)
    tables = [
        indexed_uniforms(indices, 8, seed=seed, stream=stream) for seed, stream in [(0, 0), (0, 1), (1, 0), (1, 1)]
    ]
    assert len(np.unique(np.concatenate([table.ravel() for table in tables]))) == 4 * 100 * 8


def test_numbers_are_uniform():
    numbers = indexed_uniforms(np.arange(20_000), 5, seed=3, stream=0)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # Six standard errors of the mean of 20,000 uniforms.
    assert (abs(numbers.mean(0) - 0.5) < 6 * (1 / 12 / 20_000) ** 0.5).all()


def test_global_generators_are_left_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 (it is the global state that is under test)
    indexed_uniforms(np.arange(3), 5, seed=0, stream=0)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
