"""Fingerprints: a few numbers that tell whether tensors that are computed again are what they were."""

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from revgrad.errors import StreamError

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 0.25, torch.float16: 0.1}


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative error from which on something recovered in float arithmetic is taken for wrong."""
    return _TOLERANCE.get(dtype.to_real(), 0.0)


def fingerprint(streams: Sequence[Tensor], precise: bool = True) -> Tensor:
    """Three numbers per stream that tell streams apart: a weighted sum, the sum over the root of their number, the
    sum of squares.

    What has to be copied is copied in pieces, so that checking a large stream takes little memory.

    Args:
        streams: The streams.
        precise: Whether every bit shall count: in float64, and equal streams give equal fingerprints, bit for bit.
            Otherwise sums within a piece are in float32 (but for float64), which takes a third of the time; from
            magnitudes of 1e16 on they overflow.

    Raises:
        StreamError: A tensor is of a kind that has no such sums.
    """
    try:
        found = _numbers(streams, precise)
    except (RuntimeError, TypeError) as error:
        other = next((x for x in streams if x.is_nested or type(x).__torch_dispatch__ is not _PLAIN), None)
        if other is None:
            raise
        raise _no_numbers(other) from error
    if type(found) is not Tensor and is_traceable_wrapper_subclass(found):
        raise _no_numbers(found)
    return found


def _numbers(streams: Sequence[Tensor], precise: bool) -> Tensor:
    flat = [_flat(x.detach()) for x in streams]
    sums = torch.stack([_sums(x, precise) for x in flat])
    return (sums / _units(tuple(map(len, flat)), sums.device)).flatten()


def _no_numbers(x: Tensor) -> StreamError:
    return StreamError(
        f"a stream or message is a {type(x).__name__}, of which the backward pass cannot compare sums with those of "
        "the forward pass: make it an ordinary tensor (of a nested one, x.values()), or choose mode='stored'"
    )


_PLAIN = Tensor.__torch_dispatch__


def relative_error(found: Tensor, expected: Tensor, numbers: list[int]) -> Tensor:
    """How far apart fingerprints of streams with these numbers of elements are. Nothing in it waits for the device."""
    # The weights average out: the plain sum sees the same error everywhere, the squares see a wrong scale.
    # A stream of zeros (a velocity at the start) has no size of its own: it is judged by that of the largest
    # stream, and where all are zero, as if all were ones.
    size = expected[2::3].sqrt()
    ones = _units(tuple(numbers), size.device)[:, 1]
    size = torch.where(size > 0, size, torch.where(size.any(), size.max(), ones)).clamp_min(1e-18)
    weighted, plain, squares = (found - expected).abs().unflatten(0, (-1, 3)).unbind(1)
    return (torch.stack([weighted, plain, squares / (2 * size)]) / size).max()


def _flat(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()).flatten() if x.is_complex() else x.flatten()


def _sums(flat: Tensor, precise: bool) -> Tensor:
    """The three sums of a tensor, `[3]` in float64."""
    dtype = torch.float64 if precise or flat.dtype == torch.float64 else torch.float32
    on_cpu = flat.device.type == "cpu"
    at_once = _PIECE * (1 if on_cpu else _PIECES_AT_ONCE)
    whole = len(flat) // _PIECE * _PIECE
    if precise or flat.dtype != dtype:
        # Where every bit counts, always read from the same buffer: a view may be unaligned, and the sum then in another
        # order.
        buffer = flat.new_empty(min(at_once, len(flat)), dtype=dtype)
    else:
        buffer, at_once = None, max(whole, at_once) if on_cpu else at_once
    parts = list(flat[:whole].split(at_once)) if whole else []
    if whole < len(flat) or not parts:
        parts.append(flat[whole:])
    weights, found = _weights(flat.device, dtype), []
    for part in parts:
        values = part if buffer is None else buffer[: len(part)].copy_(part)
        pieces = values.view(-1, _PIECE) if len(part) >= _PIECE else values.unsqueeze(0)
        own = weights[: len(part)]
        # Under deterministic algorithms cuBLAS, which `mv` calls, would refuse.
        weighted = torch.mv(pieces, own) if on_cpu else (pieces * own).sum(1)
        found.append((weighted, pieces.sum(1), torch.linalg.vector_norm(pieces, dim=1)))
    weighted, plain, roots = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    return torch.stack([weighted.double(), plain.double(), roots.double().square()]).sum(1)


_PIECE = 65536
"""Elements with weights of their own. Half a megabyte in float64: a copy stays in a CPU's cache."""
_PIECES_AT_ONCE = 64
"""How many are read at once where every operator is a launch."""


@cache
def _weights(device: torch.device, dtype: torch.dtype) -> Tensor:
    # A linear congruence spreads the weights over [-1, 1): equal neighbours do not cancel. They are kept for good, so
    # that they must not be fake tensors where the first to ask runs under FakeTensorMode.
    with _disable_current_modes():
        return (torch.arange(_PIECE, device=device) * 40503 % 65536).to(dtype).mul_(2.0**-15).sub_(1)


@lru_cache(1024)
def _units(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """By stream, of so many elements each, what its three sums are counted in."""
    with _disable_current_modes():
        units = torch.ones(len(numbers), 3, dtype=torch.float64, device=device)
        for i, n in enumerate(numbers):
            units[i, 1].fill_(max(1, n) ** 0.5)  # nothing goes from the host to the device
        return units
