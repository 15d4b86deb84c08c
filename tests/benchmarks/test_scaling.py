from benchmarks.test_scaling import LARGE, ROUNDS, timed_rounds


def run(seconds):
    """The order in which three steps of so many seconds run, and the rounds that count."""
    order = []
    rounds = timed_rounds({name: lambda name=name: order.append(name) or seconds for name in "abc"})
    return "".join(order), rounds


def test_a_round_that_does_not_count_comes_first_and_the_order_rotates():
    order, rounds = run(1.0)
    assert ROUNDS == 2
    assert order == "abc" + "bca" + "cab"
    assert rounds == [{"a": 1.0, "b": 1.0, "c": 1.0}] * ROUNDS


def test_what_takes_long_runs_in_one_round_after_it():
    order, rounds = run(LARGE / 3 + 0.1)
    assert order == "abc" + "bca"
    assert len(rounds) == 1
    assert len(run(LARGE / 3 - 0.1)[1]) == ROUNDS
