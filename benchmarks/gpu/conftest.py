"""What has to be known before anything is measured on a GPU."""

from pathlib import Path

import pytest

from benchmarks.gpu.pieces import check_commit
from benchmarks.reporting import commit


@pytest.fixture(scope="session", autouse=True)
def known_commit() -> None:
    """Fail now rather than after minutes of measuring, whose rows could not be joined with those of other commands."""
    check_commit(commit(Path(__file__).parent))
