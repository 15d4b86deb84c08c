"""Work that no time step waits for, done for several time steps as one batch."""

from typing import Any

import torch

from revgrad import unroll
from revgrad.layer import Streams
from revgrad.links import Chain


def apply_at_once(chain: Chain, streams: Streams, together: int, **how: Any) -> Streams:
    """Apply a chain without states to the streams of several time steps.

    Args:
        chain: Its layers.
        streams: `[N, B, ...]` each, time first.
        together: How many time steps are one batch; the last one may have fewer.
        how: Mode and arithmetic, as for `unroll`.

    Returns:
        The results, `[N, B, ...]` each.
    """
    parts = []
    for some in zip(*(x.split(together) for x in streams), strict=True):
        results, _ = unroll(chain, [tuple(x.flatten(0, 1) for x in some)], **how)
        parts.append([y[0].unflatten(0, some[0].shape[:2]) for y in results])
    return tuple(torch.cat(ys) if len(ys) > 1 else ys[0] for ys in zip(*parts, strict=True))
