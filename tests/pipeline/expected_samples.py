"""What the rolling sample hash of a run has to be, computed apart from the code under test."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable


def expected_hashes(batches: Iterable[Iterable[int]]) -> list[str]:
    """Return the hash after each step, of a run whose steps consume these global sample indices."""
    hashes, state = [], b""
    for batch in batches:
        words = [struct.unpack("<II", hashlib.blake2b(struct.pack("<q", i), digest_size=8).digest()) for i in batch]
        totals = struct.pack("<2Q", *map(sum, zip(*words, strict=True)))
        state = hashlib.blake2b(state + totals, digest_size=8).digest()
        hashes.append(state.hex())
    return hashes
