"""Every example trains, and stored and reversible training agree."""

import importlib
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGE = (EXAMPLES.parent / "docs" / "examples.md").read_text()
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "comparison")
EXACT = {"irevnet", "huggingface_reformer"}  # equal to the last bit, not only close


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.parametrize("name", NAMES)
def test_example(name, capsys):
    if name == "huggingface_reformer":
        pytest.importorskip("transformers")
    runs = importlib.import_module(name).main(["--steps", "12"])
    stored, reversible = runs["stored"], runs["reversible"]
    for run in (stored, reversible):
        assert min(run.losses[-4:]) < 0.97 * run.losses[0], run.losses
    if name in EXACT:
        assert reversible.losses == stored.losses
    assert reversible.losses[:4] == pytest.approx(stored.losses[:4], rel=2e-3)
    assert reversible.peak < stored.peak / 2
    told = re.search(rf"/{name}\.py\).* ([\d.]+) MiB \| ([\d.]+) MiB \|$", PAGE, re.MULTILINE)
    assert told, f"docs/examples.md lacks {name}.py"
    assert [run.peak / 2**20 for run in (stored, reversible)] == pytest.approx(
        [float(x) for x in told.groups()], rel=0.1
    )
    printed = capsys.readouterr().out
    assert "memory of a step" in printed
    assert all(f"{run.peak / 2**20:.2f} MiB" in printed for run in (stored, reversible))


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_says_how_to_run_it(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert f"python examples/{name}.py --steps " in text.split('"""')[1]
    assert len(text.splitlines()) <= 100
