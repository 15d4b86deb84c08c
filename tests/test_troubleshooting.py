"""The page of error messages quotes what the source says, and leaves no error out."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
SOURCES = sorted([*(ROOT / "revgrad").glob("*.py"), *(ROOT / "kernels" / "revgrad_kernels").glob("*.py")])
OURS = {"ReversibilityError", "ResidueOverflow", "StreamError", "BackendError"}
VALUE = "\0"  # where a message has a name or a number


def text_of(node: ast.AST) -> str | None:
    """A string, or an f-string with its values blotted out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
    return None


def messages() -> Iterator[tuple[str, str]]:
    """Place and text of every error of our own classes."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OURS:
                text = text_of(node.args[0])
                assert text is not None, f"{path.name}:{node.lineno}: the message is not in one piece"
                yield f"{path.name}:{node.lineno}", text


def quotes(page: str) -> list[str]:
    """What stands in code in the first column of the tables."""
    columns = re.findall(r"^\| (`.*?`) \| ", page, re.MULTILINE)
    return [quote for column in columns for quote in re.findall(r"`([^`]+)`", column)]


def occurs(quote: str, text: str) -> bool:
    return re.search(".+?".join(map(re.escape, quote.split("..."))), text, re.DOTALL) is not None


OWN, _, _PYTORCH = PAGE.partition("## Messages of PyTorch")
STRINGS = [t for path in SOURCES for node in ast.walk(ast.parse(path.read_text())) if (t := text_of(node))]


@pytest.mark.parametrize("quote", quotes(OWN))
def test_what_is_quoted_is_said(quote):
    assert any(occurs(quote, text) for text in STRINGS)


@pytest.mark.parametrize(("place", "text"), list(messages()))
def test_every_error_is_on_the_page(place, text):
    assert any(occurs(quote, text) for quote in quotes(OWN)), f"docs/troubleshooting.md lacks {place}: {text!r}"


def test_nothing_is_overlooked():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) - PAGE.count("\n## ") == len(re.findall(r"^\| `", PAGE, re.MULTILINE))
    assert len(list(messages())) > 60
