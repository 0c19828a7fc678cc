"""Curves of a hundred thousand steps made drawable: down-sampling that keeps spikes, and smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby


def thin(x: Sequence[float], y: Sequence[float], limit: int) -> list[int]:
    """Return the indices, ascending, of at most `limit` points that draw the same picture.

    The range of x is cut into limit/3 equal buckets, about a pixel each, and of every bucket the first, the lowest
    and the highest point stay; so does the last point of all. Averages or triangle-based selection would hide the
    spikes that people look for; extremes alone would empty the middle of a cloud of dots.

    Args:
        x: positions, ascending.
        y: values, finite, same length.
        limit: most points to keep, at least 4; series this short stay whole.
    """
    if len(x) <= limit:
        return list(range(len(x)))
    buckets = (limit - 1) // 3
    scale = buckets / ((x[-1] - x[0]) or 1.0)
    kept = {len(x) - 1}
    first = 0
    for _, bucket in groupby(x, lambda position: min(int((position - x[0]) * scale), buckets - 1)):
        after = first + sum(1 for _ in bucket)
        indices = range(first, after)
        kept |= {first, min(indices, key=y.__getitem__), max(indices, key=y.__getitem__)}
        first = after
    return sorted(kept)


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Return the mean of every value's neighbours on both sides, with weights that fall exponentially.

    The weight at a distance of d steps is (1 - 2/(span+1))^d: an exponential moving average run in both directions,
    which does not lag behind a falling curve as a one-sided one does.
    """
    keep = 1.0 - 2.0 / (span + 1.0)
    before = _decaying_sums(values, keep)
    after = _decaying_sums(values[::-1], keep)[::-1]
    weights = _decaying_sums([1.0] * len(values), keep)
    return [
        (before[i] + after[i] - value) / (weights[i] + weights[-1 - i] - 1.0)  # the value itself is in both sums
        for i, value in enumerate(values)
    ]


def _decaying_sums(values: Sequence[float], keep: float) -> list[float]:
    return list(accumulate(values, lambda total, value: keep * total + value))
