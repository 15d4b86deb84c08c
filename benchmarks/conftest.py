"""Collects the reports of all benchmarks of a run, and prints them at its end."""

import shlex
from collections.abc import Callable

import pytest

from benchmarks.reporting import README, RESULTS, Report, environment, include

_REPORTS = pytest.StashKey[list[tuple[str, str]]]()


@pytest.fixture(scope="session")
def publish(pytestconfig: pytest.Config) -> Callable[[Report], None]:
    """Write a report to `benchmarks/results/` if it is complete, and print it at the end of the run."""
    published = pytestconfig.stash.setdefault(_REPORTS, [])
    command = shlex.join(["pytest", *pytestconfig.invocation_params.args])

    def write(report: Report) -> None:
        if not any(table.rows for table in report.tables.values()):
            return
        where = environment(command)
        if report.complete:
            written = ", ".join(path.name for path in report.write(where))
            outcome = f"written to {RESULTS}: {written}"
            include(README, report.name, next(iter(report.tables.values())).to_markdown())
        else:
            outcome = "not all of it was measured: the written results were left as they are"
        published.append((report.to_markdown(where), outcome))

    return write


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print all tables."""
    for markdown, outcome in config.stash.get(_REPORTS, []):
        title, _, text = markdown.partition("\n")
        terminalreporter.section(title.removeprefix("# "))
        terminalreporter.write_line(text.strip())
        terminalreporter.write_line(outcome)
