"""The order of training samples: a keyed permutation of the rows, computed where it is needed and stored nowhere."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1, _MULTIPLIER_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ROUNDS = 6  # four make a pseudorandom permutation (Luby and Rackoff 1988); small domains profit from more


class Permutation:
    """A bijection of range(size) onto itself, chosen by `key`, in O(1) memory and O(1) time an index.

    A Feistel network over the next power of two whose two halves may differ in width, alternately mixed into each
    other; an image outside the range is mapped again until it falls inside ("cycle walking", Black and Rogaway 2002;
    fewer than two rounds on average, since the domain is less than twice the range). The mixer is the finaliser of
    splitmix64 (Steele, Lea and Flood 2014).
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        assert 1 <= size <= 2**62, size
        self._size = size
        bits = (size - 1).bit_length()
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64(2 ** (bits // 2) - 1)
        self._high_mask = np.uint64(2 ** (bits - bits // 2) - 1)
        state = 0
        for number in (size, *key):
            state = _mix_int((state ^ (number & _MASK)) + _GOLDEN)
        self._round_keys = [np.uint64(_mix_int(state + (i + 1) * _GOLDEN)) for i in range(_ROUNDS)]

    def apply(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Return the images of `indices`, any shape, each in range(size)."""
        flat = np.asarray(indices).astype(np.uint64).ravel()
        assert flat.size == 0 or int(flat.max()) < self._size, "index outside of the permutation"
        images = self._encrypt(flat)
        while (outside := np.flatnonzero(images >= np.uint64(self._size))).size:
            images[outside] = self._encrypt(images[outside])
        return images.astype(np.int64).reshape(np.shape(indices))

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        low, high = values & self._low_mask, values >> self._low_bits
        for i, key in enumerate(self._round_keys):
            if i % 2:
                low ^= _mix(high + key) & self._low_mask
            else:
                high ^= _mix(low + key) & self._high_mask
        return (high << self._low_bits) | low


def sample_rows(samples: npt.NDArray[np.integer], rows: int, seed: int, source: int = 0) -> npt.NDArray[np.int64]:
    """Return the row of each sample index, any shape: every row once an epoch, each epoch in its own order.

    Sample s belongs to epoch s // rows. A pure function: neither rank nor world size enters. Datasets of a mixture
    count their own samples; `source` tells them apart, so that two of equal size are ordered independently.
    """
    epochs, positions = np.divmod(np.asarray(samples, dtype=np.int64), rows)
    chosen = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = Permutation(rows, (seed, int(epoch), source)).apply(positions[here])
    return chosen


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
    return values ^ (values >> np.uint64(31))


def _mix_int(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MULTIPLIER_1) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLIER_2) & _MASK
    return value ^ (value >> 31)
