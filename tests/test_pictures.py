"""The pictures of the documentation are drawn from the arithmetic that they show."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("pictures")


@pytest.mark.parametrize("value", [-7, 0, 45, 46])
def test_the_merge_that_is_drawn_is_that_of_the_kernels(pictures, value):
    assert pictures.EXAMPLE._replace(value=value).agrees()


def test_the_gated_merge_is_drawn_with_all_its_numbers(pictures, tmp_path):
    figure = pictures.draw()
    figure.savefig(tmp_path / "drawn.png")
    merge = pictures.EXAMPLE
    for axes in figure.axes:
        shown = {text.get_text().strip() for text in axes.texts}
        numbers = (merge.value, merge.product, merge.scaled, merge.merged, merge.reservoir, merge.rest, merge.filled)
        assert {str(number) for number in numbers} <= shown


def test_the_picture_is_there_and_shown(pictures):
    assert pictures.PICTURE.read_bytes().startswith(b"\x89PNG")
    assert f"images/{pictures.PICTURE.name}" in (ROOT / "docs" / "exact-arithmetic.md").read_text()
