"""The front door cannot rot: commands, example, links and numbers of the README and of the pages in docs/."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BENCHMARKS = ROOT / "benchmarks" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", BENCHMARKS, *sorted((ROOT / "docs").glob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """All lines of all shell blocks."""
    lines = [line for page in PAGES for block in blocks(page.read_text(), "bash") for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_the_two_commands_install_all_they_need():
    train, test = [c for c in commands() if c.startswith("python3 -m venv") and c.count("&&") == 2]
    for command, extra in ((train, ".[crevnet]"), (test, ".[test]")):
        make, install, _ = command.split(" && ")
        assert shlex.split(make) == ["python3", "-m", "venv", ".venv"]
        assert shlex.split(install) == [".venv/bin/pip", "install", "-q", "-c", "constraints.txt", "-e", extra]
    assert train.endswith(".venv/bin/python -m crevnet.train")
    assert test.endswith(".venv/bin/python -m pytest -q -n auto --dist worksteal")


def test_the_checks_run_the_test_command():
    pattern = re.search(r"grep -E '(.*)' README.md", (ROOT / ".ci" / "run").read_text())
    assert pattern is not None
    assert len([line for line in README.splitlines() if re.match(pattern[1], line)]) == 1


def test_constraints_pin_the_tested_torch():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert all(re.fullmatch(r"[\w.\-]+==[\w.]+", pin) for pin in pins)


def test_example_runs_and_prints_what_it_says(tmp_path):
    script = tmp_path / "example.py"
    script.write_text(blocks(README, "python")[0])
    result = run(str(script))
    assert result.stdout == blocks(README, "text")[0], result.stderr


@pytest.mark.parametrize("page", PAGES[1:], ids=name_of)
def test_python_blocks_of_the_docs_run(page, capsys):
    """Each by itself, and a text block that follows is what it prints."""
    text = page.read_text()
    pairs = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", text, re.DOTALL | re.MULTILINE)
    assert len(pairs) == text.count("```python\n")
    for block, printed in pairs:
        exec(compile(block, str(page), "exec"), {})
        assert capsys.readouterr().out == printed


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_exist(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_file_of_revgrad_has_its_place_in_the_list():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## The files of revgrad")[1]
    listed = re.findall(r"`(\w+\.py)`", section)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "revgrad").glob("*.py"))


def test_entry_points_know_every_option_that_is_shown():
    from crevnet.command import parse_train_config

    shown = [c for c in commands() if re.search(r"-m crevnet\.train ", c)]
    assert shown
    for command in shown:
        arguments = shlex.split(command.split("crevnet.train", 1)[1])
        if "config.yaml" not in arguments:
            parse_train_config("train", "", arguments)
    for module in ("evaluate", "predict", "export"):
        helped = run("-m", f"crevnet.{module}", "--help").stdout
        for command in (c for c in commands() if f"crevnet.{module} " in c):
            assert all(option in helped for option in re.findall(r"--\w+", command)), command


def test_the_rows_of_table_2_are_trained_as_the_paper_trains():
    from crevnet.command import parse_train_config

    section = (ROOT / "docs" / "baselines.md").read_text().split("## Table 2")[1]
    rows = blocks(section, "bash")[0].splitlines()
    for row in rows:
        config = parse_train_config("train", "", shlex.split(row.split("crevnet.train")[1], comments=True))
        shown = (config.model.image_size, config.data.digit_size, config.data.root)
        assert shown == (64, 28, Path("MNIST")), row
        assert (config.observed, config.predicted, config.batch_size, config.steps) == (10, 10, 16, 300_000), row
        assert config.model.cell == "stlstm" if hasattr(config.model, "cell") else config.model.name == "predrnn", row
    assert len(rows) == 6


def test_benchmarks_that_are_named_exist():
    named = set(re.findall(r"pytest (benchmarks/[\w/]+\.py)", "".join(page.read_text() for page in PAGES)))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_benchmark_has_its_command_and_its_result():
    named = re.findall(
        r"`pytest benchmarks/(test_\w+)\.py --benchmark-only(?: --sweeps)?` \| \[table\]", BENCHMARKS.read_text()
    )
    assert sorted(named) == sorted(path.stem for path in BENCHMARKS.parent.glob("test_*.py"))


def test_included_tables_are_the_measured_ones():
    included = re.findall(r"<!-- begin (\w+) -->\n(.*?)\n?<!-- end \1 -->", README, re.DOTALL)
    assert included
    for name, text in included:
        assert text, name
        assert text in (ROOT / "benchmarks" / "results" / f"{name}.md").read_text()


def test_training_command_quickly(tmp_path):
    """The README's training command with fewer steps: what it writes, and what it prints at its end."""
    result = run(
        "-m", "crevnet.train", "--steps", "2", "--batch_size", "2", "--data.test_sequences", "4",
        "--run.validation_sequences", "2", "--run.threads", "1", "--run.folder", str(tmp_path / "run"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "copy last frame" in result.stdout
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"mse", "ssim", "psnr", "copy_last_frame", "seconds"} <= set(metrics)
    assert set(metrics["copy_last_frame"]) == {"mse", "mse_per_value", "ssim", "psnr"}
    for name in ("predictions.png", "predictions.gif", "config.yaml"):
        assert (tmp_path / "run" / name).stat().st_size > 0
