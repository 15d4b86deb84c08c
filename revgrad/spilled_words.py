"""Where the words that reservoirs spill are kept: exactly as many as there are, or in a buffer of fixed size.

Which elements spill depends on the gates, and so does the memory that their words take. To take no more than that, the
host has to ask the device how many there are, at every merge. A buffer of fixed size needs no answer: positions in it
are counted on the device.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from revgrad.errors import ResidueOverflow, ReversibilityError

Require = Callable[[Tensor, Callable[[], Exception]], None]
"""Takes what must be true, a bool without dimensions, and what makes the error otherwise."""


class Words(Protocol):
    """The words of one pool of reservoirs, last in, first out."""

    def __len__(self) -> int:
        """Updates that can be undone."""

    def append(self, word: Tensor, spilled: Tensor) -> None:
        """Keep the word, int16 `[numel]`, of each element that an update spilled, bool `[numel]`."""

    def pop(self, refill: Tensor) -> Tensor:
        """The words of the last update, each at its element; `refill`, bool `[numel]`, is what that update spilled.

        Raises:
            ReversibilityError: It spilled at another number of elements.
        """

    def count(self) -> int:
        """Words held."""

    def clone(self) -> "Words":
        """An independent copy."""

    def tensors(self) -> list[Tensor]:
        """All tensors, for `save_for_backward`."""

    def layout(self) -> Callable[[Iterator[Tensor]], "Words"]:
        """The inverse of `tensors`, any number of times; takes them from an iterator."""


class GrowingWords:
    """Exactly the words that were spilled. Every update waits for the device."""

    def __init__(self, updates: list[Tensor] | None = None) -> None:
        self._updates = [] if updates is None else updates

    def __len__(self) -> int:
        return len(self._updates)

    def append(self, word: Tensor, spilled: Tensor) -> None:
        """See `Words`."""
        self._updates.append(word[spilled])

    def pop(self, refill: Tensor) -> Tensor:
        """See `Words`."""
        words = self._updates.pop()
        if int(refill.count_nonzero()) != len(words):
            raise _misfit()
        return words.new_zeros(refill.shape).masked_scatter_(refill, words)

    def count(self) -> int:
        """See `Words`."""
        return sum(map(len, self._updates))

    def clone(self) -> "GrowingWords":
        """The tensors are shared: none is ever changed."""
        return GrowingWords(list(self._updates))

    def tensors(self) -> list[Tensor]:
        """All words in one piece; nothing where nothing was spilled."""
        return [torch.cat(self._updates)] if self._updates else []

    def layout(self) -> Callable[[Iterator[Tensor]], "GrowingWords"]:
        """See `Words`."""
        return partial(_grown, list(map(len, self._updates)))


def _grown(lengths: list[int], tensors: Iterator[Tensor]) -> GrowingWords:
    return GrowingWords(list(next(tensors).split(lengths)) if lengths else [])


class FixedWords:
    """Words in a buffer of fixed size, one after the other. Nothing waits for the device.

    Words that do not fit are counted and not kept.

    Args:
        capacity: Words that fit.
        require: Is told what must be true.
    """

    def __init__(self, capacity: int, require: Require) -> None:
        self.capacity = capacity
        self._require = require
        self._buffer: Tensor | None = None
        self._counts: list[Tensor] = []
        """Words held before the first update, after it, after the second one, ..."""

    def __len__(self) -> int:
        return max(0, len(self._counts) - 1)

    def append(self, word: Tensor, spilled: Tensor) -> None:
        """See `Words`. Writes behind the words held, where no other copy of this object reads."""
        if self._buffer is None:
            # One place more, for all that has none: words of elements that did not spill, and those that do not fit.
            self._buffer = word.new_zeros(self.capacity + 1)
            self._counts = [torch.zeros((), dtype=torch.int64, device=word.device)]
        before = self._counts[-1]
        place = spilled.cumsum(0).add_(before - 1).masked_fill_(~spilled, self.capacity)
        self._buffer.scatter_(0, place.clamp_max_(self.capacity), word)
        self._counts.append(before + spilled.sum())

    def pop(self, refill: Tensor) -> Tensor:
        """See `Words`; where `refill` is False, any word."""
        if self._buffer is None:
            raise _misfit()
        after = self._counts.pop()
        before = self._counts[-1]
        self._require(refill.sum() == after - before, _misfit)
        # Gates that do not fit must not lead out of the buffer before anybody has looked.
        place = refill.cumsum(0).add_(before - 1).clamp_(0, self.capacity)
        return self._buffer.index_select(0, place)

    def check(self) -> None:
        """Require that all words fitted.

        Raises:
            ReversibilityError: They did not, now or later.
        """
        if self._buffer is not None:
            self._require(self._counts[-1] <= self.capacity, partial(_overflow, self.capacity, self._counts[-1]))

    def count(self) -> int:
        """See `Words`. Waits for the device."""
        return int(self._counts[-1]) if self._counts else 0

    def clone(self) -> "FixedWords":
        """See `Words`."""
        other = FixedWords(self.capacity, self._require)
        if self._buffer is not None:
            other._buffer, other._counts = self._buffer.clone(), list(self._counts)
        return other

    def tensors(self) -> list[Tensor]:
        """The buffer and the counts; nothing where there was no update."""
        return [] if self._buffer is None else [self._buffer, torch.stack(self._counts)]

    def layout(self) -> Callable[[Iterator[Tensor]], "FixedWords"]:
        """See `Words`. What comes back reads the buffer and must not be appended to once another one has been."""
        return partial(_fixed, self.capacity, self._require, self._buffer is not None)


def _fixed(capacity: int, require: Require, held: bool, tensors: Iterator[Tensor]) -> FixedWords:
    words = FixedWords(capacity, require)
    if held:
        words._buffer, words._counts = next(tensors), list(next(tensors).unbind())
    return words


def _overflow(capacity: int, count: Tensor) -> ResidueOverflow:
    return ResidueOverflow(
        f"the residue has spilled {int(count)} words, but there is room for {capacity}, so the gradient would be "
        "wrong: gates have closed further than when the room was measured. Measure again, with measuring(), or make "
        "DeferredChecks with a larger margin="
    )


def _misfit() -> ReversibilityError:
    return ReversibilityError(
        "the residue does not fit the gates: the recomputed gates differ from those of the forward pass "
        "(a transform that is not deterministic, or other states than in the forward pass)"
    )
