"""Writes docs/composition.md from the `composes` marks of the tests: `python tests/composition/table.py`."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "composition.md"
THEMES = [
    "Randomness",
    "Modes",
    "Autograd",
    "Misuse",
    "Conditioning",
    "Structure",
    "Log-determinants",
    "Hooks",
    "Systems",
]
HEAD = """# It composes

What a reversible chain does beside the rest of PyTorch. Every row is a test, and the oracle is stored autograd with the
same weights. *Error* means that it cannot work and says so, naming the fix. This page is written by
`python tests/composition/table.py` from the marks of the tests.
"""


class Row(NamedTuple):
    """One mark of one test."""

    theme: str
    what: str
    outcome: str
    test: str


def rows() -> Iterator[Row]:
    """All marks `composes(theme, what, outcome="works")`, file by file."""
    for path in sorted((ROOT / "tests").rglob("test_*.py"), key=lambda p: (p.parent.name != "composition", p)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.composes":
                        theme, what, *outcome = (ast.literal_eval(x) for x in mark.args)
                        test = f"`{path.relative_to(ROOT / 'tests')}::{node.name}`"
                        yield Row(theme, what, outcome[0] if outcome else "works", test)


def page() -> str:
    """The page's text."""
    found = list(rows())
    unknown = {row.theme for row in found} - set(THEMES)
    if unknown:
        raise ValueError(f"marks of unknown themes {sorted(unknown)}; add them to THEMES")
    parts = [HEAD]
    for theme in THEMES:
        lines = [f"| {row.what} | {row.outcome} | {row.test} |" for row in found if row.theme == theme]
        parts.append("\n".join([f"## {theme}", "", "| what | outcome | test |", "| --- | --- | --- |", *lines]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
