"""Around a pass that fails: what it has put into modules is taken out again, whatever kept that from happening.

Memory may run out where a context is entered, and Ctrl-C may come at the very beginning of its end, so that Python
takes it for left. Modules that go on holding stand-ins for their parameters would not be trained any more, and nobody
would know.
"""

from contextlib import AbstractContextManager
from threading import get_ident
from typing import Protocol


class Entered(Protocol):
    """What has changed modules for the time of an evaluation."""

    thread: int
    """The thread that evaluates."""

    def undo(self) -> None:
        """Put back what there was; may be called again."""


class Mending(AbstractContextManager[None]):
    """Around a pass; may be entered any number of times."""

    def __init__(self) -> None:
        self.entered: Entered | None = None
        """What the evaluation at hand is in."""

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # Another thread may be refused while this one is in a backward pass through the same graph.
        if kind is not None and self.entered is not None and self.entered.thread == get_ident():
            self.entered.undo()
