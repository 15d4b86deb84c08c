from contextlib import contextmanager

from revgrad.anew import Anew


def test_a_context_is_made_whenever_it_is_entered():
    seen = []

    @contextmanager
    def make():
        mine = len(seen)
        seen.append(f"in {mine}")
        yield
        seen.append(f"out {mine}")

    anew = Anew(make)
    with anew, anew:
        pass
    with anew:
        pass
    assert seen == ["in 0", "in 1", "out 1", "out 0", "in 4", "out 4"]
