"""The samples of a step do not depend on ranks, micro-batches or what was read ahead."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.shards import RowReader, part_name
from pipeline.loader import IGNORED, Loader, MicroBatch, Share, TrainingData, contiguous, read_micro_batch
from pipeline.mixture import Change, Mixture, Source
from tests.pipeline.small_data import PAD_ID, numbered_rows, write_dataset

BATCH = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    """Two datasets, 500 rows from 0 on in three parts and 70 rows from 1000 on, 3 to 1, later 1 to 3."""
    root = tmp_path_factory.mktemp("data")
    first = write_dataset(root / "a", numbered_rows(200), numbered_rows(7, 200), numbered_rows(293, 207))
    second = write_dataset(root / "b", numbered_rows(70, 1000))
    sources = [Source("a", 500, 3.0), Source("b", 70, 1.0)]
    mixture = Mixture(sources, 5, [Change(2400, {"a": 1.0, "b": 3.0})])
    return TrainingData((root / "a", root / "b"), (first, second), mixture)


class Ranks:
    """A loader asked as the ranks of a run ask it, with contiguous shares."""

    def __init__(self, data: TrainingData, micro_batch_size: int, prefetch: int) -> None:
        self._loader, self._number, self._prefetch = Loader(data, micro_batch_size), BATCH // micro_batch_size, prefetch
        self.close = self._loader.close

    def micro_batches(self, consumed: int, rank: int, world_size: int) -> list[MicroBatch]:
        numbers = contiguous(rank, world_size, self._number)
        share, *ahead = (Share(consumed + i * BATCH, BATCH, numbers) for i in range(self._prefetch + 1))
        return self._loader.micro_batches(share, ahead)


def loader_of(data: TrainingData, micro_batch_size: int = BATCH, prefetch: int = 0) -> Ranks:
    return Ranks(data, micro_batch_size, prefetch)


def row_numbers(tokens: torch.Tensor) -> list[int]:
    return ((tokens[:, 0] - 100) * 100 + tokens[:, 1] - 100).tolist()


@settings(max_examples=25, deadline=None)
@given(
    consumed=st.integers(0, 10**12),
    split=st.sampled_from([(1, 24), (1, 4), (2, 12), (3, 8), (8, 3), (8, 1), (24, 1)]),
    prefetch=st.integers(0, 3),
)
def test_any_split_serves_the_same_global_batch(
    data: TrainingData, consumed: int, split: tuple[int, int], prefetch: int
) -> None:
    world_size, micro_batch_size = split
    reference = loader_of(data)
    (whole,) = reference.micro_batches(consumed, 0, 1)
    loader = loader_of(data, micro_batch_size, prefetch)
    parts = [part for rank in range(world_size) for part in loader.micro_batches(consumed, rank, world_size)]
    assert all(len(part.samples) == micro_batch_size for part in parts)
    assert torch.equal(torch.cat([part.samples for part in parts]), whole.samples)
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    loader.close()
    reference.close()


def test_rows_come_from_where_the_mixture_says(data: TrainingData) -> None:
    loader = loader_of(data)
    for consumed in (0, 2376, 2400, 10**12):
        (batch,) = loader.micro_batches(consumed, 0, 1)
        located = data.mixture.locate(batch.samples.numpy())
        assert row_numbers(batch.input_ids) == (located.rows + 1000 * located.sources).tolist()
        assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    loader.close()


def test_a_share_is_any_micro_batches_of_a_batch_of_any_size(data: TrainingData) -> None:
    loader = Loader(data, 3)
    whole = loader.micro_batches(Share(30, 12, (0, 1, 2, 3)), [Share(42, 24, (5, 1))])
    for consumed, size, numbers in ((30, 12, (3, 0)), (42, 24, (5, 1))):
        batches = loader.micro_batches(Share(consumed, size, numbers))
        expected = [[consumed + 3 * number + i for i in range(3)] for number in numbers]
        assert [batch.samples.tolist() for batch in batches] == expected
    assert torch.equal(loader.micro_batches(Share(30, 12, (3,)))[0].input_ids, whole[3].input_ids)
    loader.close()


def test_documents_are_numbered_by_their_begin_tokens(tmp_path: Path) -> None:
    tokens = numbered_rows(2)
    tokens[0, [4, 9]] = 0  # the begin token
    tokens[1, 0] = 0
    manifest = write_dataset(tmp_path / "data", tokens)
    reader = RowReader(tmp_path / "data", manifest)
    batch = read_micro_batch(reader, manifest, np.arange(2), np.arange(2))
    assert batch.documents.tolist() == [[0] * 4 + [1] * 5 + [2] * 7, [1] * 16]


def test_the_rest_of_a_cut_document_is_a_document_of_its_own(tmp_path: Path) -> None:
    tokens = numbered_rows(1)
    tokens[0, [3, 7, 8]] = 1, 1, 0  # end; then what lacks its begin, and its end; then begin
    manifest = write_dataset(tmp_path / "data", tokens)
    reader = RowReader(tmp_path / "data", manifest)
    batch = read_micro_batch(reader, manifest, np.arange(1), np.arange(1))
    assert batch.documents.tolist() == [[0] * 4 + [1] * 4 + [2] * 8]
    reader.close()


def test_an_epoch_serves_every_row_once(tmp_path: Path) -> None:
    rows = 5 * BATCH
    manifest = write_dataset(tmp_path / "data", numbered_rows(50), numbered_rows(rows - 50, 50))
    loader = loader_of(TrainingData((tmp_path / "data",), (manifest,), Mixture([Source("a", rows)], 1)), prefetch=2)
    for epoch in range(2):
        batches = [loader.micro_batches(epoch * rows + start, 0, 1)[0] for start in range(0, rows, BATCH)]
        assert sorted(number for batch in batches for number in row_numbers(batch.input_ids)) == list(range(rows))
    loader.close()


def test_padding_and_masked_tokens_are_no_labels(tmp_path: Path) -> None:
    tokens = numbered_rows(3)
    tokens[0, 12:] = PAD_ID
    trainable = np.ones(tokens.shape, dtype=np.bool_)
    trainable[1, :9] = False
    manifest = write_dataset(tmp_path / "data", numbered_rows(2), tokens, trainable=trainable)
    reader = RowReader(tmp_path / "data", manifest)
    batch = read_micro_batch(reader, manifest, np.arange(5), np.arange(5))
    ignored = (batch.labels == IGNORED).numpy()
    assert np.flatnonzero(ignored[2]).tolist() == list(range(11, 16))
    assert np.flatnonzero(ignored[3]).tolist() == list(range(8))
    assert not ignored[[0, 1, 4]].any()
    assert batch.trained_tokens == 5 * 16 - 5 - 8
    np.testing.assert_array_equal(batch.input_ids[2:].numpy(), tokens[:, :-1])
    reader.close()


def test_the_next_steps_are_read_while_one_is_trained_on(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = watched_reads(monkeypatch)
    loader = loader_of(data, prefetch=2)
    loader.micro_batches(0, 0, 1)
    deadline = time.monotonic() + 30
    while len(reads) < 3 * 2 and time.monotonic() < deadline:  # every batch has rows of both datasets
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(reads) == 3 * 2, "two batches ahead and no more: memory stays bounded"
    assert set(reads) == {"prefetch_0"}
    loader.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_a_seek_forgets_what_was_read_ahead(data: TrainingData) -> None:
    plain, ahead = loader_of(data), loader_of(data, prefetch=3)
    for consumed in (0, 24, 48, 7200, 24, 48, 10**12, 0):
        (expected,), (batch,) = plain.micro_batches(consumed, 0, 1), ahead.micro_batches(consumed, 0, 1)
        assert torch.equal(batch.samples, expected.samples)
        assert torch.equal(batch.input_ids, expected.input_ids)
    plain.close()
    ahead.close()


def test_a_broken_row_is_an_error_at_its_step_and_not_before(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "data", numbered_rows(2 * BATCH))
    mixture = Mixture([Source("a", 2 * BATCH)], 1)
    loader = loader_of(TrainingData((tmp_path / "data",), (manifest,), mixture), prefetch=1)
    row = int(mixture.locate([BATCH]).rows[0])
    shard = tmp_path / "data" / part_name(0) / "c.0.0"
    content = bytearray(shard.read_bytes())
    content[row * (17 * 2 + 4)] ^= 1
    shard.write_bytes(content)
    loader.micro_batches(0, 0, 1)
    with pytest.raises(DataError, match=f"row {row} .* checksum"):
        loader.micro_batches(BATCH, 0, 1)
    loader.close()


def test_nothing_is_read_beyond_the_end_of_a_limited_mixture(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "data", numbered_rows(BATCH))
    mixture = Mixture([Source("a", BATCH, limit=2 * BATCH)], 1)
    assert mixture.length == 2 * BATCH
    loader = loader_of(TrainingData((tmp_path / "data",), (manifest,), mixture), prefetch=5)
    for consumed in (0, BATCH):
        assert loader.micro_batches(consumed, 0, 1)[0].samples[0] == consumed
    loader.close()


def watched_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that have called `RowReader.rows`, one entry a call."""
    reads: list[str] = []
    rows = RowReader.rows

    def watched(self: RowReader, indices: npt.ArrayLike) -> npt.NDArray[np.unsignedinteger]:
        reads.append(threading.current_thread().name)
        return rows(self, indices)

    monkeypatch.setattr(RowReader, "rows", watched)
    return reads
