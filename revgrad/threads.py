"""Threads that would get in each other's way: a second evaluation puts stand-ins into modules."""

import threading
import weakref
from contextlib import AbstractContextManager, suppress

from torch import nn

from revgrad.errors import ReversibilityError

_USES: list["weakref.ref[Use]"] = []
"""Weak, since Ctrl-C may come where a use is about to end: it then ends with what holds it."""


class Use(AbstractContextManager[None]):
    """Around the use of modules by this thread.

    Args:
        modules: The modules.
        exclusive: Whether no other thread may use them meanwhile.

    Raises:
        ReversibilityError: Another thread uses one of them, and this use or that one is exclusive.
    """

    __slots__ = ("_entered", "exclusive", "modules", "thread")

    def __init__(self, modules: frozenset[nn.Module], *, exclusive: bool) -> None:
        self.modules = modules
        self.exclusive = exclusive
        self.thread = threading.get_ident()
        self._entered = weakref.ref(self)

    def __enter__(self) -> None:
        self.thread = threading.get_ident()
        _USES.append(self._entered)
        if len(_USES) > 1:
            for entered in tuple(_USES):
                other = entered()
                if other is None:
                    _leave(entered)
                    continue
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
        _leave(self._entered)


def _leave(entered: "weakref.ref[Use]") -> None:
    # Another thread may have found it dead, or Ctrl-C let it be left twice.
    with suppress(ValueError):
        _USES.remove(entered)
