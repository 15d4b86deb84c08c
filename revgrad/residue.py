"""Fixed-point streams and the residue: what a bit-exact merge forgets, kept so that it can be undone.

A stream in exact arithmetic is an ordinary float tensor whose values lie on a grid: integer multiples of
`2^-fraction_bits` small enough for the float's mantissa to hold them. Sums of grid values are then exact, so
additive couplings need nothing more; a float tensor on the grid *is* its integers, so a chain's output is all that
has to be saved. Leaving the representable range raises; it never wraps around.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from revgrad_kernels import forget, recall
from torch import Tensor

from revgrad.errors import ReversibilityError, StreamError

GATE_BITS = 16
"""Gates are multiples of 2^-16: as fine as the default grid of the streams."""

_WORD_BITS = 16
_LEVELS_PER_BIT = 512
_FULL = _WORD_BITS * _LEVELS_PER_BIT


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
        return torch.round(x * 2.0**self.fraction_bits).mul_(2.0**-self.fraction_bits)

    def to_integers(self, x: Tensor) -> Tensor:
        """Grid values as int64."""
        return (x * 2.0**self.fraction_bits).to(torch.int64)

    def to_floats(self, n: Tensor, dtype: torch.dtype) -> Tensor:
        """Int64 as grid values."""
        return n.to(dtype).mul_(2.0**-self.fraction_bits)


# float64 stays below 2^46 units so that a product with a 16-bit gate fits in 63 bits.
_GRIDS = {torch.float32: Grid(16, 8), torch.float64: Grid(32, 14)}


def grid_of(x: Tensor) -> Grid:
    """The grid that exact arithmetic uses for streams of this dtype.

    Raises:
        StreamError: The dtype has no grid.
    """
    if x.dtype not in _GRIDS:
        raise StreamError(
            f"exact arithmetic carries streams in float32 or float64, not {x.dtype}: "
            "convert the input, or choose arithmetic='float'"
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


@cache
def _cost_table(device: torch.device) -> Tensor:
    """Levels by which a factor `n / 2^16` raises a reservoir, for n in 0 .. 2^16: never less than `log2(2^16 / n)`
    bits.

    The 0.05 covers the reservoir's rounding: R' < R (2^16 / n) (1 + n / 2^30) while the reservoir holds 30 bits and
    more.
    """
    n = torch.arange(1, 2**GATE_BITS + 1, dtype=torch.float64)
    cost = torch.ceil((GATE_BITS - torch.log2(n)) * _LEVELS_PER_BIT + 0.05)
    cost[0] = _FULL  # exact without the 0.05, as nothing is rounded; a spill must always bring the level below _FULL
    cost[-1] = 0
    return torch.cat([torch.zeros(1, dtype=torch.float64), cost]).to(torch.int16).to(device)


class _Pool:
    """One reservoir per element, and the words spilled from it.

    An element at `level` holds an integer below `2^(30 + level / 512)`. At level 16 x 512 its low 16 bits are
    spilled as one word. The level follows from the gates alone, so that undoing an update knows, without any flag,
    whether the update spilled: it did if taking back its cost would lead below zero.
    """

    def __init__(self, value: Tensor, level: Tensor, words: list[Tensor] | None) -> None:
        self.value = value
        self.level = level
        self.words = words

    @classmethod
    def empty(cls, numel: int, device: torch.device, *, keep: bool) -> "_Pool":
        value = torch.zeros(numel, dtype=torch.int64, device=device)
        return cls(value, torch.zeros(numel, dtype=torch.int16, device=device), [] if keep else None)

    def clone(self, *, words: bool) -> "_Pool":
        return _Pool(self.value, self.level, list(self.words or ()) if words else [])

    def push(self, x: Tensor, numerator: Tensor) -> Tensor:
        scaled, self.value = forget(x, numerator, self.value, GATE_BITS)
        self.level = self.level + _cost_table(x.device)[numerator]
        full = self.level >= _FULL
        spilled = self.value[full]
        if self.words is not None:
            # int16 keeps the low word as two's complement; popping masks it back.
            self.words.append(spilled.to(torch.int16))
        if len(spilled):
            self.value[full] = spilled >> _WORD_BITS  # both were made above: nobody else holds them
            self.level -= full.to(torch.int16) * _FULL
        return scaled

    def pop(self, scaled: Tensor, numerator: Tensor) -> Tensor:
        if not self.words:
            raise ReversibilityError(
                "the residue is exhausted: this merge was not made with this residue, or it has been undone already"
            )
        word = self.words.pop()
        level = self.level - _cost_table(scaled.device)[numerator]
        empty = level < 0
        if int(empty.sum()) != len(word):
            raise ReversibilityError(
                "the residue does not fit the gates: the recomputed gates differ from those of the forward pass "
                "(a transform that is not deterministic, or other states than in the forward pass)"
            )
        if len(word):
            self.value = self.value.clone()
            self.value[empty] = (self.value[empty] << _WORD_BITS) | (word.to(torch.int64) & (2**_WORD_BITS - 1))
            level += empty.to(torch.int16) * _FULL
        self.level = level
        x, self.value = recall(scaled, numerator, self.value, GATE_BITS)
        return x


class Residue:
    """The bits that exact gated merges forget, last in, first out.

    Elements of all merges whose targets have the same number of elements share one reservoir per element.

    Args:
        keep: False where nothing will be undone (stored autograd, inference): the merges compute the same
            values, the spilled words are dropped.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        self._pools: dict[int, _Pool] = {}
        self._peaks: list[tuple[str, Tensor]] = []

    def watch(self, name: str, x: Tensor) -> None:
        """Note the largest magnitude of a stream; `check_range` judges all notes at once."""
        if x.numel():
            self._peaks.append((name, x.detach().abs().amax() / grid_of(x).limit))

    def check_range(self) -> None:
        """Raise if a watched stream left the grid.

        Raises:
            ReversibilityError: A stream is too large for the grid, infinite or NaN; names the first layer where.
        """
        peaks, self._peaks = self._peaks, []
        # One comparison for the whole chain: a single synchronisation on an accelerator.
        if not peaks or bool((torch.stack([p.float() for _, p in peaks]) < 1).all()):
            return
        # In float32 a peak in float64 just below 1 may have been rounded up to it.
        name, peak = next(((name, float(p)) for name, p in peaks if not float(p) < 1), ("", 0.0))
        if not name:
            return
        what = (
            "is not finite"
            if not math.isfinite(peak)
            else f"reached {peak:.3g} times the largest value that the grid holds"
        )
        raise ReversibilityError(
            f"{name}: the stream {what} (256 in float32, 16384 in float64). Exact arithmetic cannot go on: "
            "scale the input, normalise inside the transform or lower the learning rate; or choose arithmetic='float'"
        )

    def scale(self, x: Tensor, numerator: Tensor) -> Tensor:
        """Scale grid values by `numerator / 2^16`; the result is off the exact product by less than one grid step.

        Args:
            x: Grid values, any shape.
            numerator: int64 in `1 .. 2^16`, same shape.
        """
        pool = self._pools.get(x.numel())
        if pool is None:
            pool = self._pools[x.numel()] = _Pool.empty(x.numel(), x.device, keep=self.keep)
        grid = grid_of(x)
        scaled = pool.push(grid.to_integers(x).flatten(), numerator.flatten())
        return grid.to_floats(scaled, x.dtype).view(x.shape)

    def unscale(self, scaled: Tensor, numerator: Tensor) -> Tensor:
        """Undo the last `scale` of this size, bit for bit.

        Raises:
            ReversibilityError: There is nothing to undo, or the gates are not those of the forward pass.
        """
        pool = self._pools.get(scaled.numel())
        if pool is None:
            raise ReversibilityError(
                "exact arithmetic needs the residue of the forward pass to undo a gated merge: pass the residue "
                "that the forward "
                "pass returned, or choose arithmetic='float'"
            )
        grid = grid_of(scaled)
        x = pool.pop(grid.to_integers(scaled).flatten(), numerator.flatten())
        return grid.to_floats(x, scaled.dtype).view(scaled.shape)

    def check_undone_to(self, start: "Residue | None" = None) -> None:
        """Raise unless everything since `start` (by default: since the residue was empty) has been undone.

        Raises:
            ReversibilityError: Bits are left, so what was undone is not what was done.
        """
        for numel, pool in self._pools.items():
            then = start._pools.get(numel) if start is not None else None
            same = not pool.words and (
                not bool(pool.value.any()) and not bool(pool.level.any())
                if then is None
                else torch.equal(pool.value, then.value) and torch.equal(pool.level, then.level)
            )
            if not same:
                raise ReversibilityError(
                    "the residue is not used up after the backward pass, so the recomputation differs from the "
                    "forward pass: "
                    "is a transform not deterministic? Choose mode='stored' to train it"
                )

    @property
    def bits(self) -> int:
        """Bits stored: spilled words, reservoirs and their levels."""
        words = sum(16 * sum(map(len, pool.words or ())) for pool in self._pools.values())
        return words + sum((64 + 16) * len(pool.value) for pool in self._pools.values())

    @property
    def used_bits(self) -> float:
        """Bits of information held: spilled words, and the filled part of the reservoirs beyond their fixed 30 bits."""
        words = sum(16 * sum(map(len, pool.words or ())) for pool in self._pools.values())
        return words + sum(float(pool.level.sum()) / _LEVELS_PER_BIT for pool in self._pools.values())

    def clone(self, *, words: bool = True) -> "Residue":
        """An independent copy; tensors are shared, since every operation replaces them.

        Args:
            words: Whether to take the spilled words along. Without them the copy can go on and come back to this point.
        """
        other = Residue()
        for numel, pool in self._pools.items():
            other._pools[numel] = pool.clone(words=words)
        return other

    def tensors(self) -> list[Tensor]:
        """All tensors, for `save_for_backward`: per pool the values, the levels, and the words in one piece."""
        flat: list[Tensor] = []
        for pool in self._pools.values():
            words = torch.cat(pool.words) if pool.words else pool.value.new_empty(0, dtype=torch.int16)
            flat += [pool.value, pool.level, words]
        return flat

    def layout(self) -> list[tuple[int, list[int]]]:
        """What `unpack` needs besides the tensors: per pool its size and the lengths of the words of each update."""
        return [(numel, [len(w) for w in pool.words or ()]) for numel, pool in self._pools.items()]

    @classmethod
    def unpack(cls, layout: list[tuple[int, list[int]]], tensors: list[Tensor]) -> "Residue":
        """The inverse of `tensors` and `layout`."""
        residue = cls()
        for i, (numel, lengths) in enumerate(layout):
            value, level, words = tensors[3 * i : 3 * i + 3]
            residue._pools[numel] = _Pool(value, level, list(words.split(lengths)) if lengths else [])
        return residue


def quantise_gate(gate: Tensor) -> Tensor:
    """The numerator `n` of `1 - gate = n / 2^16`: int64 in `1 .. 2^16`, so that nothing is ever multiplied by zero."""
    return to_numerator(quantised_rest(gate))


def quantised_rest(gate: Tensor) -> Tensor:
    """`2^16 (1 - gate)` rounded, as a float: NaN where the gate is."""
    return torch.round((1 - gate) * 2.0**GATE_BITS).clamp_(1, 2**GATE_BITS)


def to_numerator(rest: Tensor) -> Tensor:
    """Int64; 1 for NaN, which as an integer would be anything, zero included."""
    return rest.nan_to_num(nan=1.0).to(torch.int64)


def entropy_bits(numerator: Tensor) -> float:
    """The information in bits that scaling by `numerator / 2^16` forgets, summed: no residue can be smaller."""
    return float((GATE_BITS - torch.log2(numerator.double())).sum()) if numerator.numel() else math.nan
