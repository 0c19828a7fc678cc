"""Which documents are held out for validation: decided by their text alone."""

from __future__ import annotations

import hashlib

_RANGE = 2**64


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split, about `fraction` (0 to 1) of all documents.

    A function of the text, so that copies of a document are never on both sides, that a corpus may grow, be reordered
    or be read by any number of ranks, and that a larger fraction holds out all that a smaller one does.

    Args:
        text: the document, after the filters.
        fraction: 0 for none, 1 for all.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"validation").digest()
    return int.from_bytes(digest, "big") < fraction * _RANGE
