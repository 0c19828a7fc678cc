"""A manifest for parts that a test has written itself, without a corpus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from data_prep.manifest import Manifest, Part, smallest_dtype


def bare_manifest(parts: Iterable[Part], row_tokens: int, vocab_size: int, **facts: Any) -> Manifest:
    """Describe `parts` of rows of `row_tokens`; what nobody looks at is made up, unless `facts` says otherwise."""
    made_up: dict[str, Any] = {
        "tokenizer_sha256": "0" * 64,
        "special_ids": {},
        "documents": 1,
        "dropped_tokens": 0,
        "text_bytes": 1,
        "unigram_entropy": 1.0,
    }
    return Manifest(
        sequence_length=row_tokens - 1,
        dtype=smallest_dtype(vocab_size),
        vocab_size=vocab_size,
        parts=tuple(parts),
        **{**made_up, **facts},
    )
