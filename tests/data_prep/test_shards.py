import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from data_prep import shards
from data_prep.errors import DataError
from data_prep.manifest import Manifest, smallest_dtype
from data_prep.shards import RowReader, part_name, write_part
from tests.data_prep.small_manifest import bare_manifest

ROW_TOKENS = 33
STRIDE = ROW_TOKENS * 2 + 4


def tokens(rows: int, vocab_size: int = 600, seed: int = 0) -> npt.NDArray[np.unsignedinteger]:
    chosen = np.random.default_rng(seed).integers(0, vocab_size, (rows, ROW_TOKENS))
    return chosen.astype(smallest_dtype(vocab_size))


def write_parts(directory: Path, *parts: npt.NDArray[np.unsignedinteger], vocab_size: int = 600) -> Manifest:
    directory.mkdir(exist_ok=True)
    written = [write_part(directory, part_name(index), rows) for index, rows in enumerate(parts)]
    return bare_manifest(written, ROW_TOKENS, vocab_size)


def shard(directory: Path, index: int = 0) -> Path:
    return directory / part_name(index) / "c.0.0"


@pytest.mark.parametrize("vocab_size", [600, 2**16, 2**16 + 1])
def test_rows_come_back_through_the_reader_and_through_zarr(tmp_path: Path, vocab_size: int) -> None:
    written = [tokens(rows, vocab_size, seed=rows) for rows in (7, 1, 64)]
    manifest = write_parts(tmp_path / "data", *written, vocab_size=vocab_size)
    reader = RowReader(tmp_path / "data", manifest)
    assert len(reader) == 72
    read = np.stack([reader.row(index) for index in range(len(reader))])
    np.testing.assert_array_equal(read, np.concatenate(written))
    assert read.dtype == (np.uint32 if vocab_size > 2**16 else np.uint16)
    for index, rows in enumerate(written):
        np.testing.assert_array_equal(zarr.open_array(tmp_path / "data" / part_name(index), mode="r")[:], rows)
    reader.close()


def test_a_part_is_two_files_and_its_record_tells_their_size(tmp_path: Path) -> None:
    manifest = write_parts(tmp_path / "data", tokens(5))
    assert sorted(path.name for path in (tmp_path / "data" / "part-00000").iterdir()) == ["c.0.0", "zarr.json"]
    assert manifest.parts[0].bytes == shard(tmp_path / "data").stat().st_size
    assert manifest.parts[0].bytes == shards.shard_bytes(5, ROW_TOKENS * 2)


def test_rows_of_zeros_lie_in_their_place(tmp_path: Path) -> None:
    rows = tokens(6)
    rows[[0, 3, 5]] = 0
    manifest = write_parts(tmp_path / "data", rows)
    reader = RowReader(tmp_path / "data", manifest)
    np.testing.assert_array_equal(np.stack([reader.row(index) for index in range(6)]), rows)


@pytest.fixture(scope="module")
def three_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    directory = tmp_path_factory.mktemp("three") / "data"
    return directory, write_parts(directory, tokens(3))


@given(offset=st.integers(0, 3 * STRIDE - 1), flip=st.integers(1, 255))
def test_a_flipped_byte_anywhere_in_a_row_or_its_checksum_is_found(
    three_rows: tuple[Path, Manifest], offset: int, flip: int
) -> None:
    directory, manifest = three_rows
    whole = shard(directory).read_bytes()
    broken = bytearray(whole)
    broken[offset] ^= flip
    shard(directory).write_bytes(broken)
    reader = RowReader(directory, manifest)
    try:
        for row in range(3):
            if row != offset // STRIDE:
                reader.row(row)
                continue
            with pytest.raises(DataError, match=rf"part-00000/c\.0\.0: row {row} at byte {row * STRIDE} .* verify"):
                reader.row(row)
    finally:
        reader.close()
        shard(directory).write_bytes(whole)


def test_a_missing_shard_raises_where_zarr_would_give_zeros(tmp_path: Path) -> None:
    manifest = write_parts(tmp_path / "data", tokens(3), tokens(3) + 1)
    shard(tmp_path / "data", 1).unlink()
    assert not np.any(zarr.open_array(tmp_path / "data" / "part-00001", mode="r")[:])
    reader = RowReader(tmp_path / "data", manifest)
    reader.row(2)
    with pytest.raises(DataError, match=r"part-00001/c\.0\.0: .* missing .* data verify"):
        reader.row(3)


def test_a_shard_cut_short_raises(tmp_path: Path) -> None:
    manifest = write_parts(tmp_path / "data", tokens(3))
    os.truncate(shard(tmp_path / "data"), 100)
    with pytest.raises(DataError, match=r"part-00000/c\.0\.0: 100 bytes, but the manifest says"):
        RowReader(tmp_path / "data", manifest).row(0)


def test_a_shard_cut_short_while_it_is_open_raises(tmp_path: Path) -> None:
    manifest = write_parts(tmp_path / "data", tokens(3))
    reader = RowReader(tmp_path / "data", manifest)
    reader.row(0)
    os.truncate(shard(tmp_path / "data"), 100)
    with pytest.raises(DataError, match="row 1 at byte 70 is cut short"):
        reader.row(1)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_row_that_does_not_exist_is_an_index_error(tmp_path: Path, index: int) -> None:
    manifest = write_parts(tmp_path / "data", tokens(3))
    with pytest.raises(IndexError):
        RowReader(tmp_path / "data", manifest).row(index)


def test_few_shards_stay_open_and_none_after_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN_SHARDS", 2)
    written = [tokens(2, seed=seed) for seed in range(5)]
    reader = RowReader(tmp_path / "data", write_parts(tmp_path / "data", *written))

    def open_shards() -> int:
        return sum(str(link.resolve()).startswith(str(tmp_path)) for link in Path("/proc/self/fd").iterdir())

    for index in (0, 9, 1, 4, 8, 2, 0):
        np.testing.assert_array_equal(reader.row(index), np.concatenate(written)[index])
        assert 1 <= open_shards() <= 2
    reader.close()
    assert open_shards() == 0
    np.testing.assert_array_equal(reader.row(0), written[0][0])
    reader.close()


def test_a_part_is_never_overwritten(tmp_path: Path) -> None:
    write_parts(tmp_path / "data", tokens(3))
    before = shard(tmp_path / "data").read_bytes()
    with pytest.raises(DataError, match="part-00000: already exists"):
        write_part(tmp_path / "data", part_name(0), tokens(4))
    assert shard(tmp_path / "data").read_bytes() == before
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["part-00000"]
