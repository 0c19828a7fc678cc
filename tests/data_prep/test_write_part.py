import errno
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from zarr.codecs import Crc32cCodec

from data_prep import shards
from data_prep.manifest import SHARD_FILE
from data_prep.shards import MASK_ARRAY, part_name, write_part

NAME = part_name(0)


def tokens(rows: int, row_tokens: int = 33, dtype: str = "uint16") -> npt.NDArray[np.unsignedinteger]:
    return np.random.default_rng(rows).integers(0, 600, (rows, row_tokens)).astype(dtype)


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_the_bytes_are_those_that_zarr_itself_would_write(tmp_path: Path, rows: int, dtype: str) -> None:
    written = tokens(rows, dtype=dtype)
    written[rows // 2] = 0  # a row that equals the fill value
    write_part(tmp_path, NAME, written)
    by_zarr = zarr.create_array(
        store=tmp_path / "by-zarr",
        shape=written.shape,
        shards=written.shape,
        chunks=(1, written.shape[1]),
        dtype=written.dtype,
        fill_value=0,
        filters=None,
        compressors=[Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    by_zarr[:] = written
    for file in (SHARD_FILE, "zarr.json"):
        assert (tmp_path / NAME / file).read_bytes() == (tmp_path / "by-zarr" / file).read_bytes()


def test_rows_of_any_layout_in_memory_give_the_same_bytes(tmp_path: Path) -> None:
    rows = tokens(10)
    part = write_part(tmp_path, "a", rows)
    variants = {"b": rows.astype(">u2"), "c": np.asfortranarray(rows), "d": np.repeat(rows, 2, axis=1)[:, ::2]}
    assert {write_part(tmp_path, name, variant).sha256 for name, variant in variants.items()} == {part.sha256}


@pytest.mark.parametrize("row_tokens", [1, 8, 33])
def test_loss_masks_come_back_bit_by_bit(tmp_path: Path, row_tokens: int) -> None:
    rows = tokens(7, row_tokens)
    trainable = np.random.default_rng(1).random(rows.shape) < 0.5
    part = write_part(tmp_path, NAME, rows, trainable)
    packed = zarr.open_array(tmp_path / NAME / MASK_ARRAY, mode="r")[:]
    read = np.unpackbits(np.asarray(packed), axis=1, bitorder="little")[:, :row_tokens]
    np.testing.assert_array_equal(read.astype(bool), trainable)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / NAME, mode="r")[:], rows)
    assert part.mask_bytes == (tmp_path / NAME / MASK_ARRAY / SHARD_FILE).stat().st_size
    other = write_part(tmp_path, part_name(1), rows, ~trainable)
    assert (part.sha256, part.mask_sha256 == other.mask_sha256) == (other.sha256, False)


def test_a_part_without_masks_says_so(tmp_path: Path) -> None:
    part = write_part(tmp_path, NAME, tokens(2))
    assert (part.mask_bytes, part.mask_sha256) == (0, "")
    assert not (tmp_path / NAME / MASK_ARRAY).exists()


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    original = Path.open

    def onto_the_full_disk(path: Path, *arguments: str, **options: int) -> object:
        return original(full if path.name == SHARD_FILE else path, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", onto_the_full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        write_part(tmp_path, NAME, tokens(3))
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_a_shard_is_known_beforehand(tmp_path: Path) -> None:
    assert write_part(tmp_path, NAME, tokens(5)).bytes == shards.shard_bytes(5, 66)
