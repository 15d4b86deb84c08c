"""Collects the reports of all benchmarks of a run, and prints them at its end."""

import shlex
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.reporting import RESULTS, Report, environment, include

collect_ignore = ["gpu"]
"""Hours on a GPU: what is measured there is named, and what is named is not ignored."""

_REPORTS = pytest.StashKey[dict[str, tuple[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--sweeps`."""
    parser.addoption("--sweeps", action="store_true", help="also run the benchmarks that take long (marked sweep)")


@pytest.fixture(autouse=True)
def past_first_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are those of a model that has trained for a while: only the first passes of a coupling compare messages."""
    monkeypatch.setattr("revgrad.coupling.NOTED", 0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the sweeps out unless they are asked for: the others take ten minutes in all."""
    if not config.getoption("--sweeps"):
        for item in items:
            if item.get_closest_marker("sweep"):
                item.add_marker(pytest.mark.skip(reason="a sweep: add --sweeps"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Whose processor time is the time that a step takes.

    For a whole file: what it reports when it is done names the threads that there are then.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def publish(pytestconfig: pytest.Config) -> Callable[[Report], None]:
    """Write a report to `benchmarks/results/` if it is complete or in pieces, and print it at the end of the run."""
    published = pytestconfig.stash.setdefault(_REPORTS, {})
    command = shlex.join(["pytest", *pytestconfig.invocation_params.args])

    def write(report: Report) -> None:
        if not any(table.rows for table in report.tables.values()):
            return
        where = environment(command, report.cuda)
        outcome = "not all of it was measured: the written results were left as they are"
        if report.complete or report.in_pieces:
            written = ", ".join(path.name for path in report.write(where))
            outcome = f"written to {RESULTS}: {written}"
        if report.complete:
            for i, (key, table) in enumerate(report.tables.items()):
                include(report.page, f"{report.name} {key}" if i else report.name, table.to_markdown())
        published[report.name] = report.to_markdown(where), outcome

    return write


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print all tables."""
    for markdown, outcome in config.stash.get(_REPORTS, {}).values():
        title, _, text = markdown.partition("\n")
        terminalreporter.section(title.removeprefix("# "))
        terminalreporter.write_line(text.strip())
        terminalreporter.write_line(outcome)
