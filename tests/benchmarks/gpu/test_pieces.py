import pytest

from benchmarks.gpu.pieces import joined
from benchmarks.reporting import Report, Table, environment

CONFIGURATION = {"sizes": (1, 2)}
WHERE = environment("a command") | {"commit": "abc", "device": "a GPU"}


def rows_after(folder, where=WHERE, configuration=CONFIGURATION):
    return joined("speed", "rows", [row("b", 9), row("c", 3)], ("name",), configuration, folder, where)


def row(name, us):
    return {"name": name, "us": us}


@pytest.fixture
def written(tmp_path):
    tables = {"rows": Table("Speed", {"name": "name", "us": "us"}, [row("a", 1), row("b", 2)])}
    report = Report("speed", "Speed", tables, CONFIGURATION, complete=False, in_pieces=True)
    report.write(WHERE, tmp_path)
    return tmp_path


def test_later_rows_are_added_and_replace_what_they_measure_again(written):
    assert rows_after(written) == [row("a", 1), row("b", 9), row("c", 3)]


@pytest.mark.parametrize("other", [{"commit": "def"}, {"device": "another GPU"}, {"torch": "1.0"}])
def test_what_was_measured_elsewhere_is_left_out(written, other):
    assert rows_after(written, WHERE | other) == [row("b", 9), row("c", 3)]


def test_what_was_measured_otherwise_is_left_out(written):
    assert rows_after(written, configuration={"sizes": (1, 3)}) == [row("b", 9), row("c", 3)]


def test_the_first_piece(tmp_path):
    assert rows_after(tmp_path) == [row("b", 9), row("c", 3)]


def test_without_a_commit_nothing_can_be_joined(written):
    with pytest.raises(ValueError, match="set REVGRAD_COMMIT"):
        rows_after(written, WHERE | {"commit": None})
