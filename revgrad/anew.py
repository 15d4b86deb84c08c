"""Contexts that are entered more than once."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class Anew(AbstractContextManager[None]):
    """A context that is made whenever it is entered: there may be several backward passes through the same graph."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(self._make())
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)
