"""Bit-exact scaling of integers by `n / 2^k`, the forgotten bits kept in a per-element reservoir.

`forget` maps the pair (value, reservoir) to (scaled value, reservoir) one to one. With `u` the digit that leaves the
reservoir in radix `n`, and `r` the digit that enters it in radix `2^k`::

    u  = R mod n          R1 = R div n
    w  = X n + u          X' = w div 2^k      r = w mod 2^k
    R' = R1 2^k + r

`X' ` differs from `X n / 2^k` by less than one unit, and the reservoir grows by `log2(2^k / n)` bits, which is exactly
the information that the scaling forgets: no rounding up to whole symbols. The reservoir as a source of digits
follows MacLaurin et al. 2015 (Gradient-based hyperparameter optimization through reversible learning) and MacKay et
al. 2018 (Reversible recurrent neural networks); taking the digit out *before* the product, rather than after it,
keeps the full resolution of X.

An element at `level` holds an integer below `2^(30 + level / 512)` in its reservoir. An update raises the level by the
cost of its `n`. From level 16 x 512 on, the low 16 bits are spilled as one word and the level falls by as much. The
level follows from the gates alone, so that undoing an update knows, without any flag, whether the update spilled: it
did if taking back its cost would lead below zero.
"""

from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

GATE_BITS = 16
"""Gates are multiples of 2^-16: as fine as the grid of float32. Kernels have the number itself."""
WORD_BITS = 16
"""Bits that spill at once. Likewise."""
LEVELS_PER_BIT = 512
FULL = WORD_BITS * LEVELS_PER_BIT
"""The level that an element spills at."""


def level_costs(device: torch.device) -> Tensor:
    """Levels by which a factor `n / 2^16` raises a reservoir, int16, for n in 0 .. 2^16: never less than
    `log2(2^16 / n)` bits.

    The 0.05 covers the reservoir's rounding: R' < R (2^16 / n) (1 + n / 2^30) while the reservoir holds 30 bits and
    more.
    """
    return _kept_costs(device)


# As `torch.compiler.assume_constant_result` does, which imports the compiler: that takes seconds.
level_costs._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _kept_costs(device: torch.device) -> Tensor:
    # Kept for good: neither of fake tensors nor of inference, whoever is the first to ask.
    with _disable_current_modes(), torch.inference_mode(False):
        n = torch.arange(1, 2**GATE_BITS + 1, dtype=torch.float64, device="cpu")
        cost = torch.ceil((GATE_BITS - torch.log2(n)) * LEVELS_PER_BIT + 0.05)
        cost[0] = FULL  # exact without the 0.05, as nothing is rounded; a spill must always bring the level below FULL
        cost[-1] = 0
        return torch.cat([torch.zeros_like(n[:1]), cost]).to(torch.int16).to(device)


def forget(value: Tensor, numerator: Tensor, reservoir: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale `value` by `numerator / 2^bits` and put what is forgotten into the reservoir.

    Args:
        value: int64, any sign, `|value| < 2^(63 - bits)`.
        numerator: int64 in `1 .. 2^bits`, same shape.
        reservoir: int64, `0 <= R < 2^(62 - bits)`, same shape.
        bits: Resolution of the factor.

    Returns:
        The scaled values (rounded down after a dither below one unit) and the new reservoir.
    """
    remaining = reservoir // numerator
    # w = X n + (R - R1 n); what overflows at the ends of the range comes back with the sum.
    product = (value - remaining).mul_(numerator).add_(reservoir)
    remaining = remaining.bitwise_left_shift_(bits).bitwise_or_(product & ((1 << bits) - 1))
    return product.bitwise_right_shift_(bits), remaining


def recall(scaled: Tensor, numerator: Tensor, reservoir: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Undo `forget`: from its two results back to `(value, reservoir)`, bit for bit."""
    product = (scaled << bits).bitwise_or_(reservoir & ((1 << bits) - 1))
    value = product.div(numerator, rounding_mode="floor")
    return value, (reservoir >> bits).sub_(value).mul_(numerator).add_(product)


def push(
    value: Tensor, numerator: Tensor, reservoir: Tensor, level: Tensor, costs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`forget` with 16 bits, then spill: `(scaled, reservoir, level, word, spilled)`, all of one shape."""
    scaled, reservoir = forget(value, numerator, reservoir, GATE_BITS)
    level = costs.index_select(0, numerator).add_(level)
    spilled = level >= FULL
    word = reservoir.to(torch.int16)
    torch.where(spilled, reservoir >> WORD_BITS, reservoir, out=reservoir)
    return scaled, reservoir, level.add_(spilled, alpha=-FULL), word, spilled


def refill_of(numerator: Tensor, level: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """The level before a `push`, and where that spilled."""
    level = level - costs.index_select(0, numerator)
    refill = level < 0
    return level.add_(refill, alpha=FULL), refill


def pop(scaled: Tensor, numerator: Tensor, reservoir: Tensor, word: Tensor, refill: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `push`: put the words back, then `recall`: `(value, reservoir)`."""
    # int16 keeps the low word as two's complement.
    filled = (reservoir << WORD_BITS).bitwise_or_(word.to(torch.int64).bitwise_and_(2**WORD_BITS - 1))
    return recall(scaled, numerator, torch.where(refill, filled, reservoir), GATE_BITS)


def quantised_rest(gate: Tensor) -> Tensor:
    """`2^16 (1 - gate)` rounded, at least 1, as a float: NaN where the gate is."""
    return torch.rsub(gate, 2**GATE_BITS, alpha=2**GATE_BITS).round_().clamp_min_(1)


def to_numerator(rest: Tensor) -> Tensor:
    """Int64; 1 for NaN, which as an integer would be anything, zero included."""
    return rest.nan_to_num(nan=1.0).to(torch.int64)


_DTYPES = {
    "reservoir": torch.int64,
    "level": torch.int16,
    "word": torch.int16,
    "refill": torch.bool,
    "costs": torch.int16,
}


def check_reservoirs(operator: str, x: Tensor, **tensors: Tensor) -> None:
    """Check what an operator needs besides floats, given by its name; costs are one table for all elements of `x`.

    Raises:
        ValueError: A dtype is another one, or there is not one entry for each element.
    """
    for name, t in tensors.items():
        if t.dtype != _DTYPES[name]:
            raise ValueError(f"{operator}: {name} must be {_DTYPES[name]}, not {t.dtype}")
    flat = [t for name, t in tensors.items() if name != "costs"]
    if any(t.numel() != x.numel() or t.ndim != 1 for t in flat):
        shapes = ", ".join(str(tuple(t.shape)) for t in flat)
        raise ValueError(f"{operator}: needs a reservoir for each element of {tuple(x.shape)}, got {shapes}")
