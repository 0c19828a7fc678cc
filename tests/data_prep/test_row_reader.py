"""Reading many rows at once: any order, any parts, loss masks, few files and one look at each."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.manifest import Manifest
from data_prep.shards import RowReader, part_name, write_part
from tests.data_prep.small_manifest import bare_manifest

ROW_TOKENS = 21
SIZES = (7, 1, 30, 2)


def written(directory: Path, vocab_size: int, *, masked: tuple[int, ...] = ()) -> tuple[Manifest, Any, Any]:
    """Write parts of SIZES rows; return the manifest, all rows, and which of their tokens are trained on."""
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    rng = np.random.default_rng(vocab_size)
    rows: npt.NDArray[Any] = rng.integers(0, vocab_size, (sum(SIZES), ROW_TOKENS)).astype(dtype)
    flags = np.ones(rows.shape, dtype=np.bool_)
    directory.mkdir()
    parts, start = [], 0
    for number, size in enumerate(SIZES):
        here = slice(start, start + size)
        start += size
        if number in masked:
            flags[here] = rng.random((size, ROW_TOKENS)) < 0.5
        parts.append(write_part(directory, part_name(number), rows[here], flags[here] if number in masked else None))
    return bare_manifest(parts, ROW_TOKENS, vocab_size), rows, flags


@pytest.fixture(scope="module", params=[600, 2**17])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RowReader, Any, Any]:
    directory = tmp_path_factory.mktemp("rows") / "data"
    manifest, rows, flags = written(directory, request.param, masked=(0, 2))
    return RowReader(directory, manifest), rows, flags


@settings(max_examples=100, deadline=None)
@given(
    wanted=st.one_of(
        st.lists(st.integers(0, sum(SIZES) - 1), max_size=60),
        st.integers(0, sum(SIZES) - 1).flatmap(
            lambda first: st.integers(first, sum(SIZES)).map(lambda end: list(range(first, end)))
        ),
    )
)
def test_any_rows_come_in_the_order_asked_for(dataset: tuple[RowReader, Any, Any], wanted: list[int]) -> None:
    reader, rows, flags = dataset
    read, trainable = reader.rows(wanted), reader.trainable(wanted)
    assert read.dtype == rows.dtype
    np.testing.assert_array_equal(read, rows[wanted].reshape(-1, ROW_TOKENS))
    np.testing.assert_array_equal(trainable, flags[wanted].reshape(-1, ROW_TOKENS))


def test_neighbours_are_one_read_and_a_part_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, rows, _ = written(tmp_path / "data", 600)
    calls: Counter[str] = Counter()
    for name in ("open", "stat", "preadv", "fstat"):
        monkeypatch.setattr(os, name, counted(calls, name))
    reader = RowReader(tmp_path / "data", manifest)
    assert not calls, "a reader that has read nothing has touched nothing"
    np.testing.assert_array_equal(reader.rows(np.arange(len(rows))), rows)
    assert calls == {"open": 4, "fstat": 4, "preadv": 4}
    reader.rows([3, 9, 4])
    assert calls == {"open": 4, "fstat": 4, "preadv": 7}
    reader.close()


def test_a_broken_row_in_a_run_is_named(tmp_path: Path) -> None:
    manifest, _, _ = written(tmp_path / "data", 600, masked=(2,))
    stride = ROW_TOKENS * 2 + 4
    shard = tmp_path / "data" / part_name(2) / "c.0.0"
    flip(shard, 5 * stride + 3)
    reader = RowReader(tmp_path / "data", manifest)
    with pytest.raises(DataError, match=rf"part-00002/c\.0\.0: row 13 at byte {5 * stride} does not match"):
        reader.rows(np.arange(40))
    reader.rows(np.arange(13))
    mask = tmp_path / "data" / part_name(2) / "trainable" / "c.0.0"
    flip(mask, 0)
    with pytest.raises(DataError, match=r"part-00002/trainable/c\.0\.0: row 8 at byte 0 does not match"):
        reader.trainable([7, 8])
    os.truncate(shard, 30 * stride)
    with pytest.raises(DataError, match=r"part-00002/c\.0\.0: \d+ bytes, but the manifest says"):
        RowReader(tmp_path / "data", manifest).rows([9])
    os.truncate(shard, 29 * stride + 1)  # the first reader has it open
    with pytest.raises(DataError, match=rf"row 37 at byte {29 * stride} is cut short"):
        reader.rows(np.arange(20, 38))
    reader.close()


def test_a_shard_that_was_replaced_under_a_running_job_is_refused(tmp_path: Path) -> None:
    manifest, rows, _ = written(tmp_path / "data", 600)
    reader = RowReader(tmp_path / "data", manifest)
    reader.rows([0])
    other = np.flip(rows[8:38], axis=0)  # as many rows of the same tokens, each with a checksum of its own
    shutil.rmtree(tmp_path / "data" / part_name(2))
    write_part(tmp_path / "data", part_name(2), other)
    with pytest.raises(DataError, match=r"part-00002/c\.0\.0: not the shard that the manifest describes"):
        reader.rows([9])


def test_a_dataset_without_masks_has_no_files_of_them_to_open(tmp_path: Path) -> None:
    manifest, _, _ = written(tmp_path / "data", 600)
    reader = RowReader(tmp_path / "nowhere", manifest)
    assert reader.trainable([0, 20]).all()


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def counted(calls: Counter[str], name: str) -> Any:
    real = getattr(os, name)

    def call(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return real(*arguments, **options)

    return call


def test_rows_are_tokens_as_numpy_knows_them(dataset: tuple[RowReader, npt.NDArray[Any], Any]) -> None:
    reader, rows, _ = dataset
    np.testing.assert_array_equal(reader.row(8), rows[8])
    np.testing.assert_array_equal(reader.rows([8, 9]).astype(np.int64), rows[8:10].astype(np.int64))
