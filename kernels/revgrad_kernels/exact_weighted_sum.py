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
"""

from torch import Tensor


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
    product = value * numerator + (reservoir - remaining * numerator)
    return product >> bits, (remaining << bits) | (product & ((1 << bits) - 1))


def recall(scaled: Tensor, numerator: Tensor, reservoir: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Undo `forget`: from its two results back to `(value, reservoir)`, bit for bit."""
    product = (scaled << bits) | (reservoir & ((1 << bits) - 1))
    value = product.div(numerator, rounding_mode="floor")
    return value, (reservoir >> bits) * numerator + (product - value * numerator)
