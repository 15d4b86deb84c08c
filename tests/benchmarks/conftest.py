"""What stands in for measuring."""

from typing import Any

import pytest


class Rehearsal:
    """Takes the place of pytest-benchmark's fixture: notes what is to be measured, and measures nothing."""

    disabled = True

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def pedantic(self, function: Any, arguments: tuple[Any, ...] = (), **asked: int) -> None:
        self.asked = asked


@pytest.fixture
def rehearsal():
    """A benchmark that runs nothing, and then has `asked`: how many rounds of what kind."""
    return Rehearsal()
