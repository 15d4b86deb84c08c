"""Memory budgets: what is stored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from revgrad import ReversibleSequential, StreamError, Swap
from revgrad.budget import choose_stored, parse_budget, parse_bytes
from revgrad.cost import ChainCost, LayerCost, StreamStorage

pytestmark = pytest.mark.usefixtures("single_thread", "warm")

BATCH, WIDTH = 64, 4
STREAM = BATCH * WIDTH * 4
LOTS = "1 GiB"


# Sizes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, 0),
        (12345, 12345),
        ("7 B", 7),
        ("2KB", 2000),
        ("1.5 MB", 1_500_000),
        ("3 GB", 3 * 10**9),
        ("2 KiB", 2048),
        (" 0.5 MiB ", 2**19),
        ("2 gib", 2**31),
        ("1 TiB", 2**40),
    ],
)
def test_sizes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize(
    "size", [-1, 1.5, True, None, "", "2", "GiB", "2 GiB more", "two GiB", "-1 MB", "1e9 B", "2 XB"]
)
def test_nonsense_sizes(size):
    with pytest.raises(StreamError, match="memory_budget must be a number of bytes or a text such as"):
        parse_bytes(size)


def test_free_is_a_budget_but_no_number_of_bytes():
    assert parse_budget("free") == "free"
    assert parse_budget("2 KiB") == 2048
    with pytest.raises(StreamError, match="got 'free'"):
        parse_bytes("free")


def test_wrong_options(make):
    with pytest.raises(StreamError, match=r"got 'lots'.*; or 'free'"):
        make.chain("additive", 2, memory_budget="lots")
    for mode in ("stored", "checkpoint"):
        with pytest.raises(StreamError, match=f"it goes with mode='reversible', not '{mode}'"):
            make.chain("additive", 2, mode=mode, memory_budget=LOTS)


# What is stored


def uniform(depth, flops=lambda i: 100, saved=lambda i: 3000, stream=1000):
    """Layers that change two streams in turn, none of which is saved."""
    places = [[0, 1]]
    for i in range(depth):
        places.append([*places[-1]])
        places[-1][i % 2] = i + 2
    layers = tuple(LayerCost(f"{i}", flops(i), flops(i), {("graph", i): saved(i)}, {}) for i in range(depth))
    streams = tuple(tuple(StreamStorage(n, 0 if n < 2 else stream, stream) for n in place) for place in places)
    return ChainCost(layers, streams, ({},) * (depth + 1), {}, exact=False)


def drawn(stored):
    return "".join("s" if s else "r" for s in stored)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(0, "rrrrr"), (2900, "rrrrr"), (20000, "sssss"), (10**9, "sssss")],
)
def test_none_and_all(budget, expected):
    assert drawn(choose_stored(uniform(5), budget)) == expected


def test_of_equal_layers_neighbours_are_stored():
    """Every place where stored and reversed layers meet costs the streams there."""
    for budget in (6100, 9100, 12100):
        assert drawn(choose_stored(uniform(8), budget)).count("sr") <= 1


def test_the_layer_that_saves_most_per_byte_comes_first():
    assert drawn(choose_stored(uniform(5, flops=lambda i: 10**6 if i == 2 else 100), 6000)) == "rrsrr"
    assert (
        drawn(choose_stored(uniform(5, flops=lambda i: 10**6, saved=lambda i: 100 if i == 2 else 6000), 4000))
        == "rrsrr"
    )


def test_what_does_not_fit_makes_room_for_what_does():
    chosen = choose_stored(
        uniform(4, flops=lambda i: 10**6 if i == 3 else 10, saved=lambda i: 500 if i == 3 else 5), 60
    )
    assert not chosen[3]
    assert any(chosen)


@given(
    st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 5000)), min_size=1, max_size=8),
    st.integers(0, 30000),
    st.sampled_from([None, 1, 2, 3]),
)
def test_the_budget_is_kept(layers, budget, anchor_every):
    cost = uniform(len(layers), flops=lambda i: layers[i][0], saved=lambda i: layers[i][1])
    nothing = cost.kept([False] * len(layers), anchor_every)
    chosen = choose_stored(cost, budget, anchor_every)
    assert len(chosen) == len(layers)
    assert cost.kept(chosen, anchor_every) <= nothing + budget


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ([3, 3, 3, 3, 3], "rrrrs"),
        ([9, 3, 3, 3, 3], "rrsss"),
        ([3, 3, 7, 2, 2], "rrrss"),
        ([3, 3, 3, 3, 4], "rrrrr"),
        ([5], "r"),
    ],
)
def test_free_are_the_last_ones_that_save_no_more_than_one_in_front(saved, expected):
    cost = uniform(len(saved), saved=lambda i: 1000 * saved[i])
    assert drawn(choose_stored(cost, "free")) == expected


def test_within_a_budget_they_come_first_where_none_in_front_saves_more_per_byte():
    """The first one takes less, since the caller holds its input, but stays until the end."""
    assert drawn(choose_stored(uniform(5, saved=lambda i: 3000 + 1000 * (i > 0)), 6000)) == "srrrr"
    assert drawn(choose_stored(uniform(5), 6000)) == "rrrrs"


def test_long_chains_are_planned_in_time():
    assert sum(choose_stored(uniform(1000), 3000 * 500)) > 490


def test_bijections_go_with_their_neighbours(make):
    """A swap between two stored couplings would otherwise be a run of its own, which copies streams."""
    layers = [x for i in range(4) for x in (make.coupling("additive", WIDTH), Swap())]
    model = ReversibleSequential(*layers, memory_budget=5 * STREAM)
    model(*make.streams(BATCH, WIDTH))
    (stored,) = model._stored_layers.values()
    assert any(stored)
    assert not all(stored)
    assert stored[1] == stored[2]
    assert stored[3] == stored[4]
    assert stored[5] == stored[6] == stored[7]
