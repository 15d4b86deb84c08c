"""What all benchmarks share: where numbers were measured, tables of them, files written wholly or not."""

import json
import os
import platform
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of numbers, and how to show them."""

    caption: str
    columns: Mapping[str, str]
    """Keys of the rows that are shown, each with its heading."""
    rows: Sequence[Row]
    decimals: int = 2

    def to_markdown(self) -> str:
        """A Markdown table that also reads well as plain text: text to the left, numbers to the right."""
        cells = [[_shown(row.get(key), self.decimals) for key in self.columns] for row in self.rows]
        is_text = [any(isinstance(row.get(key), str) for row in self.rows) for key in self.columns]
        headings = list(self.columns.values())
        widths = [max(3, *map(len, column)) for column in zip(headings, *cells, strict=True)]

        def line(texts: Sequence[str]) -> str:
            aligned = [x.ljust(w) if left else x.rjust(w) for x, w, left in zip(texts, widths, is_text, strict=True)]
            return f"| {' | '.join(aligned)} |"

        rule = ["-" * w if left else "-" * (w - 1) + ":" for w, left in zip(widths, is_text, strict=True)]
        return "\n".join([f"**{self.caption}**", "", line(headings), line(rule), *map(line, cells)])


@dataclass(frozen=True)
class Report:
    """The results of one benchmark file."""

    name: str
    """Stem of the files that are written."""
    title: str
    tables: Mapping[str, Table]
    """By the key that their rows have in the JSON file."""
    configuration: Mapping[str, Any]
    """What was measured, completely enough to measure it again."""
    notes: Sequence[str] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """Contents by file name."""
    complete: bool = True
    """Whether every row was measured; only then the files are written."""

    def to_markdown(self, environment: Row) -> str:
        """Title, tables, notes, and where all this was measured."""
        parts = [f"# {self.title}", *(table.to_markdown() for table in self.tables.values() if table.rows)]
        parts += [f"![{self.title}]({name})" for name in self.pictures]
        parts += ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n\n".join([*parts, _measured(environment)]) + "\n"

    def write(self, environment: Row, folder: Path = RESULTS) -> list[Path]:
        """Write the JSON file, the Markdown file and the pictures; return their paths."""
        data = {
            "title": self.title,
            "environment": environment,
            "configuration": self.configuration,
            "results": {key: list(table.rows) for key, table in self.tables.items()},
        }
        files = {
            f"{self.name}.json": json.dumps(data, indent=2, allow_nan=False).encode() + b"\n",
            f"{self.name}.md": self.to_markdown(environment).encode(),
            **self.pictures,
        }
        return [write_file(folder / name, content) for name, content in files.items()]


def include(page: Path, name: str, text: str) -> bool:
    """Put a text between the lines `<!-- begin NAME -->` and `<!-- end NAME -->` of a page; False if it has none."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, found, rest = page.read_text().partition(begin)
    if not found or end not in rest:
        return False
    write_file(page, f"{before}{begin}{text.strip()}\n{end}{rest.partition(end)[2]}".encode())
    return True


def environment(command: str) -> dict[str, Any]:
    """Where, when and with what something is being measured.

    Args:
        command: What measures it.
    """
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **commit(Path(__file__).parent),
        "device": f"CPU, {cpu_model()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def commit(folder: Path) -> dict[str, Any]:
    """The commit that a folder is at, and whether anything but results differs from it; None outside a git checkout."""
    results = f":(exclude,top){RESULTS.parent.name}/{RESULTS.name}"
    changed = _git(folder, "status", "--porcelain", "--", ":/", results)
    return {
        "commit": _git(folder, "rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, or failing that its architecture."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the 20th and 80th percentile."""
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"p20": float(p20), "median": float(median), "p80": float(p80)}


def write_file(path: Path, content: bytes) -> Path:
    """Write a file, wholly or not at all; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _git(folder: Path, *arguments: str) -> str | None:
    # Without optional locks `git status` leaves the index alone.
    command = ["git", "-C", str(folder), "--no-optional-locks", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _shown(value: Any, decimals: int) -> str:
    if value is None:
        return ""
    return f"{value:,.{decimals}f}" if isinstance(value, float) else str(value)


def _measured(environment: Row) -> str:
    commit = (environment["commit"] or "unknown")[:12]
    changes = " with uncommitted changes" if environment["uncommitted_changes"] else ""
    return (
        f"Measured {environment['date']} by `{environment['command']}` at commit {commit}{changes}, "
        f"on {environment['device']} ({environment['threads']} of {environment['cores']} cores), "
        f"PyTorch {environment['torch']}, Python {environment['python']}."
    )
