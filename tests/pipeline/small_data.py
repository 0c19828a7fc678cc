"""Small datasets written directly, without a corpus, for the tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.manifest import Manifest
from data_prep.shards import part_name, write_part
from tests.data_prep.small_manifest import bare_manifest

ROW_TOKENS = 17
PAD_ID = 2


def numbered_rows(rows: int, first: int = 0) -> npt.NDArray[np.uint16]:
    """Rows that tell their number: its two digits in base 100 come first; no token is the pad."""
    numbers = np.arange(first, first + rows)
    tokens = np.full((rows, ROW_TOKENS), 3) + np.arange(ROW_TOKENS) % 7
    tokens[:, 0], tokens[:, 1] = 100 + numbers // 100, 100 + numbers % 100
    return tokens.astype(np.uint16)


def write_dataset(
    directory: Path, *parts: npt.NDArray[np.uint16], trainable: npt.NDArray[np.bool_] | None = None
) -> Manifest:
    """Write and publish a dataset of `parts`; `trainable` is of the last part."""
    directory.mkdir(parents=True)
    masks = [None] * (len(parts) - 1) + [trainable]
    written = zip(parts, masks, strict=True)
    manifest = bare_manifest(
        [write_part(directory, part_name(i), rows, mask) for i, (rows, mask) in enumerate(written)],
        ROW_TOKENS,
        vocab_size=300,
        special_ids={"<|begin_text|>": 0, "<|end_text|>": 1, "<|pad|>": PAD_ID},
        padding_tokens=int(sum((rows == PAD_ID).sum() for rows in parts)),
    )
    manifest.write(directory)
    return manifest
