"""The page of the documentation is what the marks say."""

import runpy
from pathlib import Path

table = runpy.run_path(str(Path(__file__).with_name("table.py")))


def test_page_is_up_to_date():
    assert table["PAGE"].read_text() == table["page"](), "run python tests/composition/table.py"


def test_every_row_is_there_once():
    rows = list(table["rows"]())
    assert len(rows) >= 52
    assert len({(row.theme, row.what) for row in rows}) == len(rows)
