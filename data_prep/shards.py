"""Rows of tokens on disk: one Zarr v3 array a part, written by zarr and read back with one pread a row.

A part is a directory of two files: zarr.json, and one shard `c.0.0` that holds every row of the part. The array has
shape (rows, row_tokens); its single shard has inner chunks (1, row_tokens) with codecs bytes (little endian) and
crc32c. Hence row k of a part starts at byte k * (row_bytes + 4) of the shard and ends with its checksum; the index
(16 bytes a row and a checksum) follows the rows.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from data_prep.errors import DataError
from data_prep.files import published_directory
from data_prep.manifest import SHARD_FILE, Manifest, Part, part_problem

CHECKSUM_BYTES = 4
_MAX_OPEN_SHARDS = 64
_INDEX_ENTRY_BYTES = 16


def part_name(index: int) -> str:
    """Return the name of the directory of part `index`."""
    return f"part-{index:05d}"


def shard_bytes(rows: int, row_bytes: int) -> int:
    """Return the size of the shard file of a part, bytes."""
    return rows * (row_bytes + CHECKSUM_BYTES + _INDEX_ENTRY_BYTES) + CHECKSUM_BYTES


def write_part(directory: Path, name: str, rows: npt.NDArray[np.unsignedinteger]) -> Part:
    """Write `rows`, shape (rows, row_tokens), as part `name` of a dataset; the part appears whole or not at all.

    Raises:
        DataError: the part exists.
    """
    import zarr  # slow to import, and readers do not need it
    from zarr.codecs import Crc32cCodec

    count, row_tokens = rows.shape
    with published_directory(directory / name) as partial:
        array = zarr.create_array(
            store=partial,
            shape=rows.shape,
            shards=rows.shape,
            chunks=(1, row_tokens),
            dtype=rows.dtype,
            fill_value=0,
            filters=None,
            compressors=[Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."},
            # zarr leaves out chunks that equal fill_value; a row of zeros must lie where the arithmetic says.
            config={"write_empty_chunks": True},
        )
        array[:] = rows
        shard = (partial / SHARD_FILE).read_bytes()
    assert len(shard) == shard_bytes(count, row_tokens * rows.itemsize), "zarr has laid out the rows in another way"
    return Part(name, count, len(shard), hashlib.sha256(shard).hexdigest())


class RowReader:
    """Random access to the rows of a dataset: one pread a row, its checksum verified.

    zarr itself returns zeros for a shard that is missing; this reader raises. Not for use by several threads at once.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Open nothing yet: a shard is opened when its first row is asked for, and `_MAX_OPEN_SHARDS` stay open."""
        self._directory = directory
        self._parts = manifest.parts
        self._starts = [0, *accumulate(part.rows for part in manifest.parts)]
        self._dtype, self._row_tokens, self._row_bytes = manifest.numpy_dtype, manifest.row_tokens, manifest.row_bytes
        self._open: OrderedDict[int, int] = OrderedDict()  # part -> file descriptor, the latest used last

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> npt.NDArray[np.unsignedinteger]:
        """Return row `index`, shape (row_tokens,), in the type of the disk; read-only.

        Raises:
            DataError: the row's shard is missing or too short, or the row's checksum does not match.
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a dataset of {len(self)} rows")
        part = bisect_right(self._starts, index) - 1
        stride = self._row_bytes + CHECKSUM_BYTES
        offset = (index - self._starts[part]) * stride
        data = os.pread(self._descriptor(part), stride, offset)
        if len(data) != stride:
            raise self._broken(part, f"row {index} at byte {offset} is cut short")
        if google_crc32c.value(data[: self._row_bytes]) != int.from_bytes(data[self._row_bytes :], "little"):
            raise self._broken(part, f"row {index} at byte {offset} does not match its checksum")
        return np.frombuffer(data, dtype=self._dtype, count=self._row_tokens)

    def close(self) -> None:
        """Close every shard. The reader opens them again when asked for a row."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, part: int) -> int:
        if part in self._open:
            self._open.move_to_end(part)
            return self._open[part]
        problem = part_problem(self._directory, self._parts[part])
        if problem is not None:
            raise DataError(f"{problem}; {self._next_action()}")
        if len(self._open) == _MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        self._open[part] = os.open(self._shard(part), os.O_RDONLY)
        return self._open[part]

    def _shard(self, part: int) -> Path:
        return self._directory / self._parts[part].path / SHARD_FILE

    def _broken(self, part: int, what: str) -> DataError:
        return DataError(f"{self._shard(part)}: {what}; {self._next_action()}")

    def _next_action(self) -> str:
        return f"run `rookery data verify {self._directory}`, then rebuild the dataset or restore the file"
