"""Test files run by pytest in processes of their own, and what came of them."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_OUTCOMES = {"passed": "passed", "failed": "failed", "skipped": "skipped", "error": "errors", "errors": "errors"}
_CRASHED = {"passed": 0, "failed": 0, "skipped": 0, "errors": 1}


@dataclass(frozen=True)
class Run:
    """One test file."""

    file: str
    counts: dict[str, int]
    """By outcome: passed, failed, skipped, errors."""
    seconds: float
    status: int
    output: str

    @property
    def good(self) -> bool:
        """Whether something passed and nothing failed."""
        return self.status == 0 and self.counts["passed"] > 0


def parse_summary(output: str) -> dict[str, int]:
    """What pytest counts in its last line, such as `1 failed, 12 passed, 3 skipped, 2 errors in 4.56s`.

    Raises:
        ValueError: There is no such line.
    """
    for line in reversed(output.splitlines()):
        if re.search(r" in [\d.]+s\b", line):
            found = [(_OUTCOMES.get(outcome), int(n)) for n, outcome in re.findall(r"(\d+) (\w+)", line)]
            return dict.fromkeys(_OUTCOMES.values(), 0) | {name: n for name, n in found if name}
    raise ValueError(f"pytest printed no summary: {output[-500:]!r}")


def run_file(file: str, timeout: float) -> Run:
    """Run the tests of one file."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    started = time.perf_counter()
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        status, output = result.returncode, result.stdout + result.stderr
        counts = parse_summary(result.stdout)
    except subprocess.TimeoutExpired:
        status, output, counts = -1, f"not done after {timeout:.0f} s", _CRASHED
    except ValueError:
        counts = _CRASHED
    return Run(file, counts, time.perf_counter() - started, status, output)


def run_files(files: Sequence[str], timeout: float) -> list[Run]:
    """Run several files at once, half as many as there are cores."""
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        return list(pool.map(lambda file: run_file(file, timeout), files))
