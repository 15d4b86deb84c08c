"""Random numbers by position: any part of one endless stream, at once and in any order."""

import itertools

import numpy as np

_WORDS_PER_COUNT = 4
"""Philox4x64 yields four 64-bit words per value of its counter, which is what `advance` counts."""


def indexed_uniforms(indices: np.ndarray, draws: int, *, seed: int, stream: int) -> np.ndarray:
    """Return the uniforms that belong to each index, whatever else is asked for in the same call.

    Row i of the endless table is draws [i*D, (i+1)*D) of the Philox generator with the 128-bit key
    (seed, stream), where D is `draws` rounded up to a multiple of four. Different (seed, stream) are
    different keys, so their tables are independent.

    Source: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        indices: int64 [B], non-negative, in any order.
        draws: numbers wanted per index.
        seed: first half of the key, 0 to 2**64 - 1.
        stream: second half of the key, 0 to 2**64 - 1.

    Returns:
        float64 [B, draws] in [0, 1).
    """
    counts = -(-draws // _WORDS_PER_COUNT)
    width = counts * _WORDS_PER_COUNT
    table = np.empty((len(indices), width))
    # One generator call per run of consecutive indices: a training batch is a single run.
    edges = [0, *(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), len(indices)]
    key = np.array([seed, stream], np.uint64)
    for start, stop in itertools.pairwise(edges):
        if start == stop:
            continue
        # Python integers: index times counts may exceed 64 bits, the counter has 256.
        philox = np.random.Philox(key=key).advance(int(indices[start]) * counts)
        np.random.Generator(philox).random(out=table[start:stop])
    return table[:, :draws]
