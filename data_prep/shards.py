"""Rows of tokens on disk: one Zarr v3 array a part, written a shard at a time and read back with one pread a row.

A part is a directory of two files: zarr.json, and one shard `c.0.0` that holds every row of the part. The array has
shape (rows, row_tokens); its single shard has inner chunks (1, row_tokens) with codecs bytes (little endian) and
crc32c. Hence row k of a part starts at byte k * (row_bytes + 4) of the shard and ends with its checksum; the index
(16 bytes a row and a checksum) follows the rows. zarr itself reads and writes the same bytes.

A part whose documents say which of their tokens are trained on (chat) holds a second array, `trainable/`, of the same
layout: a bit a token, the first token of a row in the lowest bit of its first byte.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from data_prep.errors import DataError
from data_prep.files import published_directory
from data_prep.manifest import SHARD_FILE, Manifest, Part

MASK_ARRAY = "trainable"  # inside a part: uint8, shape (rows, ceil(row_tokens / 8)), bit i of a row at byte i // 8
CHECKSUM_BYTES = 4
_MAX_OPEN_SHARDS = 256
_INDEX_ENTRY_BYTES = 16
_ROWS_AT_ONCE = 256  # few enough that a piece of a shard stays in the cache while it is put together and hashed


def part_name(index: int) -> str:
    """Return the name of the directory of part `index`."""
    return f"part-{index:05d}"


def shard_bytes(rows: int, row_bytes: int) -> int:
    """Return the size of the shard file of a part, bytes."""
    return rows * (row_bytes + CHECKSUM_BYTES + _INDEX_ENTRY_BYTES) + CHECKSUM_BYTES


def write_part(
    directory: Path, name: str, rows: npt.NDArray[np.unsignedinteger], trainable: npt.NDArray[np.bool_] | None = None
) -> Part:
    """Write `rows`, shape (rows, row_tokens), as part `name` of a dataset; the part appears whole or not at all.

    Args:
        directory: the dataset.
        name: what `part_name` returns.
        rows: tokens, in the type that they have on disk.
        trainable: whether each token is a target of the loss, same shape; stored beside the rows as bits.

    Raises:
        DataError: the part exists.
        OSError: the disk is full or broken; nothing of the part is left.
    """
    mask_bytes, mask_sha256 = 0, ""
    with published_directory(directory / name) as partial:
        size, sha256 = _write_array(partial, rows)
        if trainable is not None:
            assert trainable.shape == rows.shape
            with published_directory(partial / MASK_ARRAY) as beside:
                mask_bytes, mask_sha256 = _write_array(beside, np.packbits(trainable, axis=1, bitorder="little"))
    return Part(name, len(rows), size, sha256, google_crc32c.value(_as_stored(rows[-1:])), mask_bytes, mask_sha256)


def _write_array(path: Path, rows: npt.NDArray[np.unsignedinteger]) -> tuple[int, str]:
    """Write a Zarr array of one shard into the directory `path`; return the size of the shard and its sha256.

    zarr describes the array; it takes 20 times as long to write a shard of small chunks as putting its bytes together
    does, which depend on nothing but the layout at the top of this module.
    """
    import zarr  # slow to import, and readers do not need it
    from zarr.codecs import Crc32cCodec

    zarr.create_array(
        store=path,
        shape=rows.shape,
        shards=rows.shape,
        chunks=(1, rows.shape[1]),
        dtype=rows.dtype,
        fill_value=0,
        filters=None,
        compressors=[Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    digest = hashlib.sha256()
    with (path / SHARD_FILE).open("wb", buffering=0) as file:
        for piece in _shard_pieces(_as_stored(rows)):
            digest.update(piece)
            _write_all(file, piece)
        size = file.tell()
    assert size == shard_bytes(len(rows), rows.shape[1] * rows.itemsize), size
    return size, digest.hexdigest()


def _as_stored(rows: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    return rows.astype(rows.dtype.newbyteorder("<"), order="C", copy=False)


def _shard_pieces(rows: npt.NDArray[np.unsignedinteger]) -> Iterator[memoryview]:
    """Yield the bytes of a shard: rows, each followed by its checksum, then the index and its checksum."""
    count, row_bytes = len(rows), rows.shape[1] * rows.itemsize
    stored = row_bytes + CHECKSUM_BYTES
    for start in range(0, count, _ROWS_AT_ONCE):
        content = rows[start : start + _ROWS_AT_ONCE].view(np.uint8)
        piece = np.empty((len(content), stored), np.uint8)
        piece[:, :row_bytes] = content
        checksums = np.fromiter(map(google_crc32c.value, content), dtype="<u4", count=len(content))
        piece[:, row_bytes:] = checksums.view(np.uint8).reshape(-1, CHECKSUM_BYTES)
        yield piece.data.cast("B")
    index = np.empty((count, 2), "<u8")  # offset and length of each chunk
    index[:, 0] = np.arange(count, dtype=np.uint64) * stored
    index[:, 1] = stored
    yield index.data.cast("B")
    yield np.array([google_crc32c.value(index.tobytes())], "<u4").data.cast("B")


def _write_all(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


class RowReader:
    """Random access to the rows of a dataset: one read a row or a run of neighbours, each row's checksum verified.

    zarr itself returns zeros for a shard that is missing; this reader raises. Not for use by several threads at once.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Open nothing yet: a shard is opened when its first row is asked for, and `_MAX_OPEN_SHARDS` stay open."""
        parts = manifest.parts
        self._starts = np.cumsum([0, *(part.rows for part in parts)])
        self._dtype, self._row_tokens = manifest.numpy_dtype, manifest.row_tokens
        tokens = [(part.path, part.bytes, part.last_row_crc32c) for part in parts]
        self._tokens = _ShardFiles(directory, tokens, manifest.row_bytes)
        masks = [(f"{part.path}/{MASK_ARRAY}", part.mask_bytes, None) for part in parts]
        self._masks = _ShardFiles(directory, masks, -(-manifest.row_tokens // 8))
        self._masked = np.array([part.mask_bytes > 0 for part in parts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> npt.NDArray[np.unsignedinteger]:
        """Return row `index`, shape (row_tokens,), as `rows` does."""
        row: npt.NDArray[np.unsignedinteger] = self.rows([index])[0]
        return row

    def rows(self, indices: npt.ArrayLike) -> npt.NDArray[np.unsignedinteger]:
        """Return the rows `indices`, shape (n, row_tokens), in that order and in the type of the disk.

        Raises:
            DataError: a row's shard is missing or of another size, or the row's checksum does not match.
            IndexError: there is no such row.
        """
        wanted, parts = self._locate(indices)
        rows: npt.NDArray[np.unsignedinteger] = self._tokens.read(wanted, parts, self._starts).view(self._dtype)
        return rows

    def trainable(self, indices: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which tokens of the rows `indices` are targets of the loss, shape (n, row_tokens); as `rows` does."""
        wanted, parts = self._locate(indices)
        flags = np.ones((wanted.size, self._row_tokens), dtype=np.bool_)
        masked = self._masked[parts]
        if masked.any():
            bits = self._masks.read(wanted[masked], parts[masked], self._starts)
            flags[masked] = np.unpackbits(bits, axis=1, count=self._row_tokens, bitorder="little")
        return flags

    def close(self) -> None:
        """Close every shard. The reader opens them again when asked for a row."""
        self._tokens.close()
        self._masks.close()

    def _locate(self, indices: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the row numbers and the part of each."""
        wanted = np.asarray(indices, dtype=np.int64)
        assert wanted.ndim == 1, wanted.shape
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of a dataset of {len(self)} rows")
        return wanted, np.searchsorted(self._starts, wanted, side="right") - 1


class _ShardFiles:
    """The shards of one array of every part, the latest used of them open: chunks of `chunk_bytes` and a checksum."""

    def __init__(self, directory: Path, shards: Sequence[tuple[str, int, int | None]], chunk_bytes: int) -> None:
        """Take note of the path inside `directory`, the size and the last checksum (None for any) of each shard."""
        self._directory, self._shards, self._chunk_bytes = directory, shards, chunk_bytes
        self._open: OrderedDict[int, int] = OrderedDict()  # part -> file descriptor, the latest used last

    def read(
        self, wanted: npt.NDArray[np.int64], parts: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint8]:
        """Return the chunks of the rows `wanted`, shape (n, chunk_bytes); `starts` holds the first row of each part."""
        stored = np.empty((wanted.size, self._chunk_bytes + CHECKSUM_BYTES), dtype=np.uint8)
        part_of, offsets = parts.tolist(), ((wanted - starts[parts]) * stored.shape[1]).tolist()
        # Rows that follow each other in a part are read with one call; in a random order that is each for itself.
        runs = np.flatnonzero((np.diff(wanted, prepend=-2) != 1) | (np.diff(parts, prepend=-1) != 0))
        pieces = stored if runs.size == wanted.size else np.split(stored, runs[1:])
        for first, piece in zip(runs.tolist(), pieces, strict=True):
            count = os.preadv(self._descriptor(part_of[first]), [piece.data], offsets[first])
            if count != piece.size:  # a run longer than the system reads at once (2 GiB) is no batch of a loader
                short = first + count // stored.shape[1]
                raise self._broken(part_of[short], wanted[short], offsets[short], "is cut short")
        checksums = stored[:, self._chunk_bytes :].copy().view("<u4").ravel()
        chunks = stored[:, : self._chunk_bytes]
        computed = np.fromiter(map(google_crc32c.value, chunks), dtype=np.uint32, count=wanted.size)
        if (broken := np.flatnonzero(checksums != computed)).size:
            first = int(broken[0])
            raise self._broken(part_of[first], wanted[first], offsets[first], "does not match its checksum")
        return chunks

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, part: int) -> int:
        if part in self._open:
            self._open.move_to_end(part)
            return self._open[part]
        if len(self._open) >= _MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        # One request for metadata, not a stat and an open: with random rows over many shards it is one a row.
        try:
            descriptor = self._open[part] = os.open(self._path(part), os.O_RDONLY)
        except OSError as error:
            raise self._unusable(part, f"this shard of the dataset is missing ({error.strerror})") from error
        size, expected = os.fstat(descriptor).st_size, self._shards[part][1]
        if size != expected:
            os.close(self._open.pop(part))
            raise self._unusable(part, f"{size} bytes, but the manifest says {expected}")
        if not self._is_meant(descriptor, part):
            os.close(self._open.pop(part))
            raise self._unusable(part, "not the shard that the manifest describes: the dataset was changed")
        return descriptor

    def _is_meant(self, descriptor: int, part: int) -> bool:
        """Whether the last row is that of the manifest, or broken: whole, but another, it is of another shard."""
        _, size, expected = self._shards[part]
        if expected is None:
            return True
        stored = self._chunk_bytes + CHECKSUM_BYTES
        # A shard is its chunks and an index of 16 bytes for each, with a checksum.
        end = (size - CHECKSUM_BYTES) // (stored + _INDEX_ENTRY_BYTES) * stored
        checksum = int.from_bytes(os.pread(descriptor, CHECKSUM_BYTES, end - CHECKSUM_BYTES), "little")
        if checksum == expected:
            return True
        return bool(checksum != google_crc32c.value(os.pread(descriptor, self._chunk_bytes, end - stored)))

    def _path(self, part: int) -> Path:
        return self._directory / self._shards[part][0] / SHARD_FILE

    def _broken(self, part: int, row: int, offset: int, what: str) -> DataError:
        return self._unusable(part, f"row {row} at byte {offset} {what}")

    def _unusable(self, part: int, what: str) -> DataError:
        return DataError(
            f"{self._path(part)}: {what}; run `rookery data verify {self._directory}`, then rebuild the dataset or"
            " restore the file"
        )
