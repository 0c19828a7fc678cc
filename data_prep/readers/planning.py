"""From files to work items: which format a file has, and where it is cut. It follows from the files alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.corpus import COMPRESSED_SUFFIXES, SOURCE_SUFFIXES, find_files, plain_suffix
from data_prep.errors import DataError
from data_prep.readers.items import MEBIBYTE, ReaderOptions, WorkItem, unreadable
from data_prep.readers.lines import looks_like_jsonl, text_per_byte
from data_prep.readers.parquet import row_group_bytes

ITEM_BYTES = 64 * MEBIBYTE
_PARQUET_TEXT_PER_BYTE = 2
_WINDOWS = 8  # at most, of a compressed file: each is read from the beginning of the file
_COMPRESSION = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus before it is cut.

    Attributes:
        path: absolute.
        size, modified: bytes, and modification time in ns.
    """

    path: str
    size: int
    modified: int


def find_sources(inputs: Sequence[Path]) -> list[SourceFile]:
    """Return the files of `inputs` in the order of `find_files`, with size and time (one stat a file).

    Raises:
        DataError: see `find_files`; or a file cannot be read.
    """
    return [_source(path) for path in find_files(inputs)]


def whole_item(source: SourceFile, options: ReaderOptions) -> WorkItem:
    """Return the item of the whole file: its format by suffix or content, and the text to expect in it.

    A suffix decides where it is known. `.json` and unknown suffixes are opened: Parquet and compression by their
    first bytes, JSON lines by the first line.

    Raises:
        DataError: the file cannot be read.
    """
    path = Path(source.path)
    suffix, packed = plain_suffix(path), path.suffix.lower() in COMPRESSED_SUFFIXES
    item = WorkItem(source.path, "text", "", 0, -1, source.size, source.size, source.modified)
    if suffix == ".parquet" and not packed:
        return replace(item, format="parquet", bytes=source.size * _PARQUET_TEXT_PER_BYTE)
    if suffix in SOURCE_SUFFIXES and not packed:
        return _as_text(item, options)
    magic = _first_bytes(source.path)
    if magic == _PARQUET_MAGIC:
        return replace(item, format="parquet", bytes=source.size * _PARQUET_TEXT_PER_BYTE)
    compression = next((name for start, name in _COMPRESSION.items() if magic.startswith(start)), "")
    if packed and not compression and source.size:
        raise DataError(f"{path}: neither gzip nor zstd, whatever its name says; restore it or leave it out of --input")
    if packed and not source.size:
        compression = "gzip" if path.suffix.lower() == ".gz" else "zstd"
    item = replace(item, compression=compression)
    item = replace(item, bytes=int(source.size * text_per_byte(item)))
    if suffix in (".jsonl", ".ndjson"):
        return replace(item, format="jsonl")
    if suffix not in SOURCE_SUFFIXES and looks_like_jsonl(item, options):
        return replace(item, format="jsonl")
    return _as_text(item, options)


def cut(item: WorkItem, options: ReaderOptions, item_bytes: int) -> list[WorkItem]:
    """Cut a whole file into items of about `item_bytes` of text: by lines, or by row groups; text files stay whole.

    Compressed lines are cut into at most 8 windows, since a window is read by decompressing all that lies before it.

    Raises:
        DataError: a Parquet file is damaged or lacks the column. Where bad documents are skipped, it becomes one item
            that will be counted when it is read.
    """
    if item.format == "text":
        return [item]
    if item.format == "parquet":
        try:
            return list(_cut_row_groups(item, row_group_bytes(item.path, options), item_bytes))
        except DataError:
            if options.on_bad_document == "skip":
                return [item]
            raise
    pieces = max(1, round(item.bytes / item_bytes))
    if item.compression:
        pieces = min(pieces, _WINDOWS)
    bounds = [item.bytes * index // pieces for index in range(pieces)]
    ends = [*bounds[1:], -1]
    return [
        replace(item, start=start, end=end, bytes=(item.bytes if end < 0 else end) - start)
        for start, end in zip(bounds, ends, strict=True)
    ]


def plan_items(
    inputs: Sequence[Path], options: ReaderOptions | None = None, item_bytes: int = ITEM_BYTES
) -> list[WorkItem]:
    """Return the work items of `inputs`, in order; they depend on the files and the arguments alone.

    Args:
        inputs: files, directories, patterns and `.list` files, see `find_files`.
        options: how to read; the defaults if None.
        item_bytes: text in an item, bytes, where a file can be cut.

    Raises:
        DataError: an input does not exist, holds nothing, is damaged or lacks the column.
    """
    options = options or ReaderOptions()
    sources = find_sources(inputs)
    return [part for source in sources for part in cut(whole_item(source, options), options, item_bytes)]


def _source(path: Path) -> SourceFile:
    absolute = os.path.abspath(path)  # noqa: PTH100 - Path.absolute keeps `..`, Path.resolve follows links
    try:
        found = os.stat(absolute)  # noqa: PTH116 - for a path that is a string
    except OSError as error:
        raise unreadable(absolute, error) from error
    return SourceFile(absolute, found.st_size, found.st_mtime_ns)


def _first_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - the path is a string here
            return file.read(4)
    except OSError as error:
        raise unreadable(path, error) from error


def _as_text(item: WorkItem, options: ReaderOptions) -> WorkItem:
    is_prose = plain_suffix(Path(item.path)) not in SOURCE_SUFFIXES or plain_suffix(Path(item.path)) == ".txt"
    return replace(item, format="lines") if options.text_documents == "lines" and is_prose else item


def _cut_row_groups(item: WorkItem, groups: Sequence[int], item_bytes: int) -> Iterator[WorkItem]:
    start = size = 0
    for index, group in enumerate(groups):
        if size and size + group > item_bytes:
            yield replace(item, start=start, end=index, bytes=size)
            start, size = index, 0
        size += group
    if groups:
        yield replace(item, start=start, end=len(groups), bytes=size)
