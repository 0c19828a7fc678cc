"""Which samples a run has consumed, as a hash that knows neither the ranks nor the order within a global batch.

A sample counts by two words of 32 bits, hashed from its index. The ranks add up the words of what they fed to the
model, and the sums of each step are rolled into the hash of the steps before it. A sample that was left out, fed twice
or moved to another step changes the hash; the world size and the micro-batches do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

LANES = 2
"""Sums of a batch."""

_WORD = 2**32
_EXACT = 2**53  # up to here float64 has every integer


def batch_sums(samples: Iterable[int]) -> npt.NDArray[np.float64]:
    """Return the sums (2,) of the words of global sample indices; those of several batches are added.

    They are exact, in any order of adding, as long as they stay below 2^53: for 2^21 samples in any case.
    """
    low = high = 0
    for sample in samples:
        word = int.from_bytes(blake2b(int(sample).to_bytes(8, "little"), digest_size=8).digest(), "little")
        low, high = low + word % _WORD, high + word // _WORD
    return np.array([low, high], dtype=np.float64)


def roll(previous: str, sums: Sequence[float]) -> str:
    """Return the hash (16 hex digits) after a step whose samples sum up to `sums`, `previous` ("" at first) before."""
    # Numbers that are not negative have sums that round to 2^53 or above if any sum of some of them was not exact.
    assert len(sums) == LANES, sums
    assert max(sums) < _EXACT, f"the sums {sums} of a global batch are too large to be exact"
    content = b"".join(int(value).to_bytes(8, "little") for value in sums)
    return blake2b(bytes.fromhex(previous) + content, digest_size=8).hexdigest()
