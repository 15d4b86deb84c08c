"""Buffers that are used again and again, because fresh memory costs more than what is computed in it."""

import math

from torch import Tensor


def begin(buffer: Tensor, *shape: int) -> Tensor:
    """The first elements of a flat buffer, in a shape."""
    return buffer[: math.prod(shape)].view(shape)
