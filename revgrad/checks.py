"""When the engine's checks are made: at once, for which the host waits, or later, all of them together.

Every check compares something that the device has computed. Looking at once gives the error where it arises, and costs
a wait; a CUDA graph cannot be captured where anything waits.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from revgrad_kernels.reservoir import FULL
from torch import Tensor

from revgrad.errors import ReversibilityError, StreamError
from revgrad.spilled_words import FixedWords, GrowingWords, Words


class Checks:
    """Checks at once."""

    may_wait = True
    """Whether the host may wait for the device."""

    def require(self, ok: Tensor | bool, error: Callable[[], Exception]) -> None:
        """Raise unless something is true.

        Args:
            ok: A bool, or a tensor of one without dimensions.
            error: Makes the error. Where checks are deferred it is kept, with all that it refers to.
        """
        if not ok:
            raise error()

    def known_equal(self, a: Tensor, b: Tensor) -> bool:
        """Whether tensors are known to be equal."""
        return torch.equal(a, b)

    def equal(self, a: Tensor, b: Tensor, error: Callable[[], Exception]) -> None:
        """Raise unless tensors of one shape are equal, in which NaN equals nothing."""
        if not self.known_equal(a, b):
            self.require((a == b).all(), error)

    def words(self, numel: int) -> Words:
        """A place for the words that reservoirs of so many elements spill."""
        return GrowingWords()

    def complete(self, numel: int, words: Words, level: Tensor) -> None:
        """A run has made all its merges.

        Args:
            numel: Elements of the pool.
            words: What its reservoirs have spilled.
            level: How full they are, see `revgrad_kernels.reservoir`.
        """

    def refuse_random(self, names: Iterable[str]) -> None:
        """Raise if a layer has drawn random numbers, where these could not be drawn again."""


AT_ONCE = Checks()
_current: ContextVar[Checks] = ContextVar("checks", default=AT_ONCE)


def current_checks() -> Checks:
    """The checks of what is run now. A backward pass has those of its forward pass, whichever thread it runs in."""
    # A compiler cannot trace a context variable.
    return AT_ONCE if torch.compiler.is_compiling() else _current.get()


@contextmanager
def in_force(checks: Checks) -> Iterator[None]:
    """Around a part of a backward pass: what it runs again is checked as the forward pass was. On a GPU autograd calls
    it in a thread of its own, where nothing is known of the context that the forward pass ran in.
    """
    token = _current.set(checks)
    try:
        yield
    finally:
        _current.reset(token)


class DeferredChecks(Checks):
    """Forward and backward passes that never wait for the device, so that a CUDA graph can capture them.

        checks = DeferredChecks()
        with checks.measuring():
            step()                  # as always
        with checks:
            step()                  # computes the same; nothing raises
        checks.raise_if_failed()    # waits once; raises what would have been raised

    What a chain would have checked at once is collected, but for messages of its first passes, which are not looked at.
    Until `raise_if_failed` has been called results and gradients may be wrong; `passed` is a tensor that tells on the
    device, for an optimiser that skips a step (`found_inf`).

    In exact arithmetic the words that a residue spills have a buffer of fixed size. How large is measured, which takes
    one pass, and the same numbers of elements in every later one. Transforms must not draw random numbers.

    Not yet run on a GPU.

    Args:
        margin: By how much the gates may spill more than was measured. A merge spills 16 bits an element at most.
        capacities: Instead of measuring: by number of elements in the target of a gated coupling, the words for which
            there is to be room.

    Attributes:
        capacities: Those that are given, or that measuring has found.
    """

    may_wait = False

    def __init__(self, *, margin: float = 2.0, capacities: dict[int, int] | None = None) -> None:
        if not margin >= 1:
            raise StreamError(f"margin must be at least 1, got {margin!r}")
        self.margin = margin
        self.capacities = dict(capacities or {})
        self._measured = capacities is not None
        self._pending: list[tuple[Tensor, Callable[[], Exception]]] = []
        self._tokens: list[object] = []

    def __enter__(self) -> "DeferredChecks":
        if not self._measured:
            raise ReversibilityError(
                "what is to run without waiting for the device has to be measured before: run it once under "
                "DeferredChecks.measuring()"
            )
        self._tokens.append(_current.set(self))
        return self

    def __exit__(self, *error: object) -> None:
        _current.reset(self._tokens.pop())  # type: ignore[arg-type]

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Checks at once, and notes how much room the residue needs. What was noted before is forgotten."""
        found = _Measuring()
        with in_force(found):
            yield
        self.capacities = {n: min(math.ceil(self.margin * need), most) for n, (need, most) in found.needs.items()}
        self._measured = True

    def passed(self, device: torch.device | str | None = None) -> Tensor:
        """Whether all checks since the last `forget` have passed: a bool without dimensions, on the device.

        Args:
            device: Where the bool is if nothing was collected; the CPU without.
        """
        if not self._pending:
            return torch.ones((), dtype=torch.bool, device=device)
        return torch.stack([ok for ok, _ in self._pending]).all()

    def raise_if_failed(self) -> None:
        """Wait for the device, and raise the first error that would have been raised.

        The checks stay, so that this can be called after every replay of a graph that has captured them.

        Raises:
            ReversibilityError: As without deferred checks.
        """
        if self._pending:
            results = torch.stack([ok for ok, _ in self._pending]).tolist()
            for ok, (_, error) in zip(results, self._pending, strict=True):
                if not ok:
                    raise error()

    def forget(self) -> None:
        """Forget the checks collected so far: before a pass that is not replayed."""
        self._pending.clear()

    def require(self, ok: Tensor | bool, error: Callable[[], Exception]) -> None:
        """Collect a check; raises where the host knows already."""
        if isinstance(ok, Tensor):
            self._pending.append((ok, error))
        else:
            super().require(ok, error)

    def known_equal(self, a: Tensor, b: Tensor) -> bool:
        """Nothing is known."""
        return False

    def words(self, numel: int) -> Words:
        """A buffer."""
        if numel not in self.capacities:
            raise ReversibilityError(
                f"nothing is known of how much reservoirs of {numel} elements spill: run the same once, with inputs of "
                "the same shapes, under DeferredChecks.measuring()"
            )
        return FixedWords(self.capacities[numel], self.require)

    def complete(self, numel: int, words: Words, level: Tensor) -> None:
        """Whether the buffer was large enough."""
        if isinstance(words, FixedWords):
            words.check()


class _Measuring(Checks):
    """Checks at once. Notes by pool how many words it takes, and how many it could take."""

    def __init__(self) -> None:
        self.needs: dict[int, tuple[float, int]] = {}

    def complete(self, numel: int, words: Words, level: Tensor) -> None:
        # With what the reservoirs hold: if every gate forgets so much more, it spills so much more at most.
        need, most = self.needs.get(numel, (0.0, 0))
        held = words.count() + float(level.sum(dtype=torch.float64)) / FULL
        self.needs[numel] = max(need, held), max(most, len(words) * numel)

    def refuse_random(self, names: Iterable[str]) -> None:
        for name in names:
            raise ReversibilityError(
                f"{name}: the transform draws random numbers, which cannot be drawn again without waiting for the "
                "device: turn dropout off, or do not defer the checks"
            )
