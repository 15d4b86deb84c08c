"""What all benchmarks share: where numbers were measured, tables of them, files written wholly or not."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from revgrad_kernels.backend import HAS_TRITON, triton

from crevnet.files import written_whole
from crevnet.machine import cpu_model

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"

_DRIVEN_BY = {"driver": "driver", "cuda": "CUDA", "cudnn": "cuDNN", "triton": "Triton"}

_VERSIONS = ("python", "torch", "numpy", "triton", "cuda", "cudnn", "driver")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of numbers, and how to show them."""

    caption: str
    columns: Mapping[str, str]
    """Keys of the rows that are shown, each with its heading."""
    rows: Sequence[Row]
    decimals: int = 2
    formats: Mapping[str, str] = field(default_factory=dict)
    """How the numbers of single columns are shown, where the decimals do not do."""

    def to_markdown(self) -> str:
        """A Markdown table that also reads well as plain text: text to the left, numbers to the right."""
        formats = {key: self.formats.get(key, f",.{self.decimals}f") for key in self.columns}
        cells = [[_shown(row.get(key), formats[key]) for key in self.columns] for row in self.rows]
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
    """Whether every row was measured; only then the files are written, and tables put into pages."""
    in_pieces: bool = False
    """Whether the files are written before that as well."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of what took part besides the libraries that all benchmarks use."""
    page: Path = README
    """The page that shows the tables that it has a place for (see `include`): the first one under the report's name,
    others under that and their key.
    """
    cuda: bool = False
    """Whether it was measured on a GPU."""

    def to_markdown(self, environment: Row) -> str:
        """Title, tables, notes, and where all this was measured."""
        parts = [f"# {self.title}", *(table.to_markdown() for table in self.tables.values() if table.rows)]
        parts += [f"![{self.title}]({name})" for name in self.pictures]
        parts += ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        parts += [] if self.complete else ["Not all of it has been measured yet."]
        return "\n\n".join([*parts, _measured(environment)]) + "\n"

    def write(self, environment: Row, folder: Path = RESULTS) -> list[Path]:
        """Write the JSON file, the Markdown file and the pictures; return their paths.

        At the top level of the JSON file are the rows of every table by its key, `device`, `commit` and `versions`;
        the rest of the environment has an entry of its own.
        """
        versions = {key: environment[key] for key in _VERSIONS if environment.get(key)}
        data = {
            "title": self.title,
            **{key: list(table.rows) for key, table in self.tables.items()},
            "device": environment["device"],
            "commit": environment["commit"],
            "versions": versions | dict(self.versions),
            "environment": {k: v for k, v in environment.items() if k not in {"device", "commit", *versions}},
            "configuration": self.configuration,
            **({"complete": self.complete} if self.in_pieces else {}),
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


def environment(command: str, cuda: bool = False) -> dict[str, Any]:
    """Where, when and with what something is being measured.

    Args:
        command: What measures it.
        cuda: Whether on the current CUDA device.
    """
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **commit(Path(__file__).parent),
        "device": f"CPU, {cpu_model()} with {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **(gpu() if cuda else {}),
    }


def gpu() -> dict[str, Any]:
    """The current CUDA device and what drives it; `device` names all that numbers depend on."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = {
        "cpu": cpu_model(),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": properties.total_memory / 1e9,
        "l2_mb": properties.L2_cache_size / 1e6,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__ if HAS_TRITON else None,
    }
    parts = [f"{name} {found[key]}" for key, name in _DRIVEN_BY.items() if found[key]]
    return {"device": ", ".join([properties.name, *parts]), **found}


def commit(folder: Path) -> dict[str, Any]:
    """The commit that a folder is at, and whether anything but results differs from it.

    Outside a git checkout the commit is what `REVGRAD_COMMIT` in the environment says, or None.
    """
    results = f":(exclude,top){RESULTS.parent.name}/{RESULTS.name}"
    changed = _git(folder, "status", "--porcelain", "--", ":/", results)
    return {
        "commit": _git(folder, "rev-parse", "HEAD") or os.environ.get("REVGRAD_COMMIT"),
        "uncommitted_changes": None if changed is None else bool(changed),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the 20th and 80th percentile."""
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"p20": float(p20), "median": float(median), "p80": float(p80)}


def write_file(path: Path, content: bytes) -> Path:
    """Write a file, wholly or not at all; make its folder."""
    with written_whole(path) as part:
        part.write_bytes(content)
    return path


def _driver() -> str | None:
    """The version of the kernel driver, which PyTorch does not know."""
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0].strip() if found else None


def _git(folder: Path, *arguments: str) -> str | None:
    # Without optional locks `git status` leaves the index alone.
    return _output("git", "-C", str(folder), "--no-optional-locks", *arguments)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _shown(value: Any, number: str) -> str:
    if value is None:
        return ""
    return format(value, number) if isinstance(value, float) else str(value)


def _measured(environment: Row) -> str:
    commit = (environment["commit"] or "unknown")[:12]
    changes = " with uncommitted changes" if environment["uncommitted_changes"] else ""
    return (
        f"Measured {environment['date']} by `{environment['command']}` at commit {commit}{changes}, "
        f"on {environment['device']} ({environment['threads']} of {environment['cores']} cores), "
        f"PyTorch {environment['torch']}, Python {environment['python']}."
    )
