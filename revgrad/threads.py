"""Threads that would get in each other's way: a second evaluation puts stand-ins into modules."""

import threading
from contextlib import AbstractContextManager

from torch import nn

from revgrad.errors import ReversibilityError

_USES: list["Use"] = []


class Use(AbstractContextManager[None]):
    """Around the use of modules by this thread.

    Args:
        modules: The modules.
        exclusive: Whether no other thread may use them meanwhile.

    Raises:
        ReversibilityError: Another thread uses one of them, and this use or that one is exclusive.
    """

    __slots__ = ("exclusive", "modules", "thread")

    def __init__(self, modules: frozenset[nn.Module], *, exclusive: bool) -> None:
        self.modules = modules
        self.exclusive = exclusive
        self.thread = threading.get_ident()

    def __enter__(self) -> None:
        self.thread = threading.get_ident()
        _USES.append(self)
        if len(_USES) > 1:
            for other in tuple(_USES):
                if other.thread == self.thread or not (self.exclusive or other.exclusive):
                    continue
                if not self.modules.isdisjoint(other.modules):
                    self.__exit__()
                    raise ReversibilityError(
                        "two threads use the same modules in reversible mode, at least one of them in a backward pass, "
                        "which puts stand-ins for the parameters into them: give each thread a copy (copy.deepcopy), "
                        "run one after the other, or choose mode='stored'"
                    )

    def __exit__(self, *error: object) -> None:
        _USES.remove(self)
