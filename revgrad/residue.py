"""Fixed-point streams and the residue: what a bit-exact merge forgets, kept so that it can be undone.

A stream in exact arithmetic is an ordinary float tensor whose values lie on a grid: integer multiples of
`2^-fraction_bits` small enough for the float's mantissa to hold them. Sums of grid values are then exact, so
additive couplings need nothing more; a float tensor on the grid *is* its integers, so a chain's output is all that
has to be saved. Leaving the representable range raises; it never wraps around.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from revgrad_kernels import exact_weighted_sum, exact_weighted_sum_inverse, exact_weighted_sum_refill
from revgrad_kernels.exact_additive import FRACTION_BITS
from revgrad_kernels.reservoir import (
    GATE_BITS,
    LEVELS_PER_BIT,
    WORD_BITS,
    level_costs,
    pop,
    push,
    quantised_rest,
    refill_of,
    to_numerator,
)
from torch import Tensor

from revgrad.checks import Checks, current_checks
from revgrad.errors import ReversibilityError, StreamError
from revgrad.spilled_words import Words


@dataclass(frozen=True)
class Grid:
    """The fixed-point grid of a dtype: multiples of `2^-fraction_bits` below `2^integer_bits` in magnitude."""

    fraction_bits: int
    integer_bits: int

    @property
    def limit(self) -> float:
        """Magnitudes from here on cannot be represented."""
        return 2.0**self.integer_bits

    def snap(self, x: Tensor) -> Tensor:
        """Round to the nearest grid value (a scaling by powers of two is exact in floating point)."""
        return self.steps(x).mul_(2.0**-self.fraction_bits)

    def steps(self, x: Tensor) -> Tensor:
        """The nearest grid value in grid steps, in memory of its own."""
        return (x * 2.0**self.fraction_bits).round_()

    def to_integers(self, x: Tensor) -> Tensor:
        """Grid values as int64."""
        return (x * 2.0**self.fraction_bits).to(torch.int64)

    def to_floats(self, n: Tensor, dtype: torch.dtype) -> Tensor:
        """Int64 as grid values."""
        return n.to(dtype).mul_(2.0**-self.fraction_bits)


# float64 stays below 2^46 units so that a product with a 16-bit gate fits in 63 bits.
_GRIDS = {
    torch.float32: Grid(FRACTION_BITS[torch.float32], 8),
    torch.float64: Grid(FRACTION_BITS[torch.float64], 14),
}


def grid_of(x: Tensor) -> Grid:
    """The grid that exact arithmetic uses for streams of this dtype.

    Raises:
        StreamError: The dtype has no grid.
    """
    if x.dtype not in _GRIDS:
        raise StreamError(
            f"exact arithmetic carries streams in float32 or float64, not {x.dtype}: "
            "convert them in front of the chain, chain(x.float()), whose transforms may still run under autocast, or "
            "choose arithmetic='float'"
        )
    return _GRIDS[x.dtype]


def snap(x: Tensor) -> Tensor:
    """Round a float32 or float64 tensor to the grid of exact arithmetic; the gradient passes straight through."""
    return _Snap.apply(x)


class _Snap(torch.autograd.Function):
    """`x -> round(x 2^s) 2^-s`, gradient `dx = dy`; saves nothing."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return grid_of(x).snap(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


class _Pool:
    """One reservoir per element with its level (see `revgrad_kernels.exact_weighted_sum`), and the words spilled."""

    def __init__(self, value: Tensor, level: Tensor, words: Words | None) -> None:
        self.value = value
        self.level = level
        self.words = words

    @classmethod
    def empty(cls, numel: int, device: torch.device, words: Words | None) -> "_Pool":
        value = torch.zeros(numel, dtype=torch.int64, device=device)
        return cls(value, torch.zeros(numel, dtype=torch.int16, device=device), words)

    def keep(self, value: Tensor, level: Tensor, word: Tensor, spilled: Tensor) -> None:
        """Take over what an update left: new reservoirs and levels, and a word of each element that spilled."""
        self.value, self.level = value, level
        if self.words is not None:
            self.words.append(word, spilled)

    def undo(self, level: Tensor, refill: Tensor) -> tuple[Tensor, Tensor]:
        """Go back to the levels before the last update; returns its words, each at its element, and where they are."""
        if not self.words:
            raise ReversibilityError(
                "the residue is exhausted: this merge was not made with this residue, or it has been undone already"
            )
        word = self.words.pop(refill)
        self.level = level
        return word, refill


class PoolLayout(NamedTuple):
    """What a pool is besides its tensors."""

    numel: int
    words: Callable[[Iterator[Tensor]], Words] | None


class Residue:
    """The bits that exact gated merges forget, last in, first out.

    Elements of all merges whose targets have the same number of elements share one reservoir per element.

    Args:
        keep: False where nothing will be undone (stored autograd, inference): the merges compute the same
            values, the spilled words are dropped.
        checks: When what it checks is looked at, and where words are kept; by default as for all that is run now.
    """

    def __init__(self, *, keep: bool = True, checks: Checks | None = None) -> None:
        self.keep = keep
        self.checks = current_checks() if checks is None else checks
        self._pools: dict[int, _Pool] = {}
        self._peaks: list[tuple[str, Tensor]] = []

    def watch(self, name: str, x: Tensor) -> None:
        """Note the largest magnitude of a stream; `check_range` judges all notes at once."""
        if x.numel():
            low, high = torch.aminmax(x.detach())
            self._peaks.append((name, torch.maximum(-low, high) / grid_of(x).limit))

    def check_range(self) -> None:
        """Raise if a watched stream left the grid, or what was forgotten did not fit. To be called when a run is over.

        Raises:
            ReversibilityError: A stream is too large for the grid, infinite or NaN; names the first layer where.
        """
        for numel, pool in self._pools.items():
            if pool.words is not None:
                self.checks.complete(numel, pool.words, pool.level)
        noted, self._peaks = self._peaks, []
        if noted:
            # One comparison for the whole chain: a single synchronisation on an accelerator.
            widest = torch.float64 if any(p.dtype == torch.float64 for _, p in noted) else torch.float32
            peaks = torch.stack([p.to(widest) for _, p in noted])
            self.checks.require((peaks < 1).all(), partial(_out_of_range, [name for name, _ in noted], peaks))

    def merge(self, logits: Tensor, x: Tensor, h: Tensor) -> Tensor:
        """The weighted sum `(1 - g) x + g h` of grid values `x`, `g = sigmoid(logits)`, with `1 - g` and `g h` rounded.

        Args:
            logits: Shape of `x` or broadcastable to it.
            x: Grid values, any shape.
            h: As `logits`.
        """
        pool = self._pool(x)
        y, *after = exact_weighted_sum(logits, x, h, pool.value, pool.level, level_costs(x.device))
        pool.keep(*after)
        return y

    def unmerge(self, logits: Tensor, y: Tensor, h: Tensor) -> Tensor:
        """Undo the last `merge` of this size, bit for bit.

        Raises:
            ReversibilityError: There is nothing to undo, or the gates are not those of the forward pass.
        """
        pool = self._pool_to_undo(y)
        word, refill = pool.undo(*exact_weighted_sum_refill(logits, y, pool.level, level_costs(y.device)))
        x, pool.value = exact_weighted_sum_inverse(logits, y, h, pool.value, word, refill)
        return x

    def scale(self, x: Tensor, numerator: Tensor) -> Tensor:
        """Scale grid values by `numerator / 2^16`; the result is off the exact product by less than one grid step.

        Args:
            x: Grid values, any shape.
            numerator: int64 in `1 .. 2^16`, same shape.
        """
        grid, pool = grid_of(x), self._pool(x)
        integers = grid.to_integers(x).flatten()
        scaled, *after = push(integers, numerator.flatten(), pool.value, pool.level, level_costs(x.device))
        pool.keep(*after)
        return grid.to_floats(scaled, x.dtype).view(x.shape)

    def unscale(self, scaled: Tensor, numerator: Tensor) -> Tensor:
        """Undo the last `scale` of this size, bit for bit; raises as `unmerge`."""
        grid, pool, numerator = grid_of(scaled), self._pool_to_undo(scaled), numerator.flatten()
        word, refill = pool.undo(*refill_of(numerator, pool.level, level_costs(scaled.device)))
        integers = grid.to_integers(scaled).flatten()
        x, pool.value = pop(integers, numerator, pool.value, word, refill)
        return grid.to_floats(x, scaled.dtype).view(scaled.shape)

    def _pool(self, x: Tensor) -> _Pool:
        pool = self._pools.get(x.numel())
        if pool is None:
            pool = self._pools[x.numel()] = _Pool.empty(x.numel(), x.device, self._words(x.numel()))
        return pool

    def _words(self, numel: int) -> Words | None:
        return self.checks.words(numel) if self.keep else None

    def _pool_to_undo(self, x: Tensor) -> _Pool:
        pool = self._pools.get(x.numel())
        if pool is None:
            raise ReversibilityError(
                "exact arithmetic needs the residue of the forward pass to undo a gated merge: give the same "
                "residue=Residue() to both, under torch.no_grad(), or choose arithmetic='float'"
            )
        return pool

    def check_undone_to(self, start: "Residue | None" = None) -> None:
        """Raise unless everything since `start` (by default: since the residue was empty) has been undone.

        Raises:
            ReversibilityError: Bits are left, so what was undone is not what was done.
        """
        for numel, pool in self._pools.items():
            if pool.words:
                raise _left_over()
            then = start._pools.get(numel) if start is not None else None
            if then is None:
                self.checks.require(~pool.value.any(), _left_over)
                self.checks.require(~pool.level.any(), _left_over)
            else:
                self.checks.equal(pool.value, then.value, _left_over)
                self.checks.equal(pool.level, then.level, _left_over)

    @property
    def bits(self) -> int:
        """Bits stored: spilled words, reservoirs and their levels."""
        return self._word_bits() + sum((64 + 16) * len(pool.value) for pool in self._pools.values())

    @property
    def used_bits(self) -> float:
        """Bits of information held: spilled words, and the filled part of the reservoirs beyond their fixed 30 bits."""
        levels = sum(float(pool.level.sum()) / LEVELS_PER_BIT for pool in self._pools.values())
        return self._word_bits() + levels

    def _word_bits(self) -> int:
        return sum(WORD_BITS * pool.words.count() for pool in self._pools.values() if pool.words is not None)

    def clone(self, *, words: bool = True, keep: bool = True) -> "Residue":
        """An independent copy; tensors are shared, since every operation replaces them.

        Args:
            words: Whether to take the spilled words along. Without them the copy can go on and come back to this point.
            keep: Whether the copy keeps the words that it spills itself.
        """
        other = Residue(keep=keep, checks=self.checks)
        for numel, pool in self._pools.items():
            kept = pool.words.clone() if words and pool.words is not None else other._words(numel)
            other._pools[numel] = _Pool(pool.value, pool.level, kept)
        return other

    def resume(self, other: "Residue") -> None:
        """Go on from where another one stands; the words that it holds stay with it."""
        self._pools = {n: _Pool(p.value, p.level, self._words(n)) for n, p in other._pools.items()}

    def tensors(self) -> list[Tensor]:
        """All tensors, for `save_for_backward`: per pool the values, the levels, and what holds the words."""
        flat: list[Tensor] = []
        for pool in self._pools.values():
            flat += [pool.value, pool.level, *(pool.words.tensors() if pool.words is not None else ())]
        return flat

    def layout(self) -> list[PoolLayout]:
        """What `unpack` needs besides the tensors."""
        return [
            PoolLayout(numel, None if pool.words is None else pool.words.layout())
            for numel, pool in self._pools.items()
        ]

    @classmethod
    def unpack(cls, layout: list[PoolLayout], tensors: Iterable[Tensor], checks: Checks | None = None) -> "Residue":
        """The inverse of `tensors` and `layout`."""
        residue, it = cls(checks=checks), iter(tensors)
        for numel, words in layout:
            value, level = next(it), next(it)
            residue._pools[numel] = _Pool(value, level, residue._words(numel) if words is None else words(it))
        return residue


def _out_of_range(names: list[str], peaks: Tensor) -> ReversibilityError:
    name, peak = next((name, peak) for name, peak in zip(names, peaks.tolist(), strict=True) if not peak < 1)
    what = f"reached {peak:.3g} times the largest value that the grid holds" if math.isfinite(peak) else "is not finite"
    return ReversibilityError(
        f"{name}: the stream {what} (256 in float32, 16384 in float64). Exact arithmetic cannot go on: "
        "scale the input, normalise inside the transform or lower the learning rate; or choose arithmetic='float'"
    )


def _left_over() -> ReversibilityError:
    return ReversibilityError(
        "the residue is not used up after the backward pass, so the recomputation differs from the forward pass: "
        "is a transform not deterministic? Choose mode='stored' to train it"
    )


def quantise_gate(gate: Tensor) -> Tensor:
    """The numerator `n` of `1 - gate = n / 2^16`: int64 in `1 .. 2^16`, so that nothing is ever multiplied by zero."""
    return to_numerator(quantised_rest(gate))


def entropy_bits(numerator: Tensor) -> float:
    """The information in bits that scaling by `numerator / 2^16` forgets, summed: no residue can be smaller."""
    return float((GATE_BITS - torch.log2(numerator.double())).sum()) if numerator.numel() else math.nan
