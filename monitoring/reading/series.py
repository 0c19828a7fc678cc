"""Curves of a hundred thousand steps made drawable: down-sampling that keeps spikes, and smoothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_BLOCK = 256


def thin(x: ArrayLike, y: ArrayLike, limit: int) -> NDArray[np.int64]:
    """Return the indices, ascending, of at most `limit` points that draw the same picture.

    The range of x is cut into limit/3 equal buckets, about a pixel each, and of every bucket the first, the lowest
    and the highest point stay; so does the last point of all. Averages or triangle-based selection would hide the
    spikes that people look for; extremes alone would empty the middle of a cloud of dots.

    Args:
        x: positions, ascending.
        y: values, finite, same length.
        limit: most points to keep, at least 4; series this short stay whole.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(x) <= limit:
        return np.arange(len(x))
    buckets = (limit - 1) // 3
    width = x[-1] - x[0]
    place = np.minimum((x - x[0]) / width * buckets, buckets - 1).astype(np.int64) if width > 0.0 else np.zeros(len(x))
    starts = np.flatnonzero(np.diff(place, prepend=-1.0))
    counts = np.diff(starts, append=len(x))
    kept = np.zeros(len(x), dtype=bool)
    kept[starts] = kept[-1] = True
    for extreme in (np.minimum, np.maximum):
        at = np.flatnonzero(y == np.repeat(extreme.reduceat(y, starts), counts))
        kept[at[np.flatnonzero(np.diff(place[at], prepend=-1.0))]] = True  # the first of equals
    return np.flatnonzero(kept)


def smooth(values: ArrayLike, span: float) -> Floats:
    """Return the mean of every value's neighbours on both sides, with weights that fall exponentially.

    The weight at a distance of d steps is (1 - 2/(span+1))^d: an exponential moving average run in both directions,
    which does not lag behind a falling curve as a one-sided one does.
    """
    values = np.asarray(values, dtype=np.float64)
    keep = 1.0 - 2.0 / (span + 1.0)
    before = _decaying_sums(values, keep)
    after = _decaying_sums(values[::-1], keep)[::-1]
    powers = keep ** np.arange(1, len(values) + 1)
    weights = (1.0 - powers) / (1.0 - keep)
    mean: Floats = (before + after - values) / (weights + weights[::-1] - 1.0)  # the value itself is in both sums
    return mean


def _decaying_sums(values: Floats, keep: float) -> Floats:
    """Return sums[i] = values[i] + keep * sums[i-1], a block of values at a time."""
    blocks = -(-len(values) // _BLOCK)
    padded = np.zeros(blocks * _BLOCK)
    padded[: len(values)] = values
    distance = np.arange(_BLOCK)[None, :] - np.arange(_BLOCK)[:, None]
    decay = np.where(distance >= 0, keep ** np.maximum(distance, 0), 0.0)
    sums: NDArray[Any] = padded.reshape(blocks, _BLOCK) @ decay
    carried = keep ** np.arange(1, _BLOCK + 1)
    for i in range(1, blocks):
        sums[i] += sums[i - 1, -1] * carried
    return sums.reshape(-1)[: len(values)]
