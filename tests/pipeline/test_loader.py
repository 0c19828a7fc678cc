"""The samples of a step do not depend on ranks or micro-batches."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.manifest import Manifest
from pipeline.loader import Loader


def loader_of(corpus: Path, micro_batch_size: int) -> Loader:
    directory = corpus / "data" / "train"
    manifest = Manifest.load(directory)
    return Loader(directory, manifest, seed=3, global_batch_size=24, micro_batch_size=micro_batch_size)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    consumed=st.integers(0, 10**12),
    split=st.sampled_from([(1, 24), (1, 4), (2, 12), (3, 8), (8, 3), (8, 1), (24, 1)]),
)
def test_any_split_serves_the_same_global_batch(corpus: Path, consumed: int, split: tuple[int, int]) -> None:
    world_size, micro_batch_size = split
    (whole,) = loader_of(corpus, 24).micro_batches(consumed, 0, 1)
    loader = loader_of(corpus, micro_batch_size)
    parts = [part for rank in range(world_size) for part in loader.micro_batches(consumed, rank, world_size)]
    assert torch.equal(torch.cat([part.samples for part in parts]), whole.samples)
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    loader.close()


def test_labels_are_the_next_tokens_and_an_epoch_serves_every_row_once(corpus: Path) -> None:
    loader = loader_of(corpus, 24)
    rows = Manifest.load(corpus / "data" / "train").rows
    seen: dict[bytes, int] = {}
    for start in range(0, rows - rows % 24, 24):
        (batch,) = loader.micro_batches(start, 0, 1)
        assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
        for row in batch.input_ids:
            seen[row.numpy().tobytes()] = seen.get(row.numpy().tobytes(), 0) + 1
    assert len(seen) == rows - rows % 24
    assert set(seen.values()) == {1}
