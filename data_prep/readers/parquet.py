"""Parquet: one column of text or chat, streamed a few rows at a time out of a range of row groups.

A reader holds the pages of one column that it is in and about `_BATCH_BYTES` of rows, whatever the size of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from data_prep.errors import DataError
from data_prep.readers.items import Document, OnBad, ReaderOptions, WorkItem, too_long, unreadable
from data_prep.readers.lines import is_chat

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_BUFFER = 2**20
_BATCH_BYTES = 8 * 2**20
_BATCH_ROWS = 1024


def row_group_bytes(path: str, options: ReaderOptions) -> list[int]:
    """Return the uncompressed bytes of the text (or chat) column in each row group.

    Raises:
        DataError: the file is no whole Parquet file, or has neither column.
    """
    with _opened(path) as file:
        column = _column(file, path, options)
        metadata = file.metadata
        leaves = [
            index
            for index in range(metadata.num_columns)
            if f"{metadata.schema.column(index).path}.".startswith(f"{column}.")
        ]
        return [_group_bytes(metadata.row_group(index), leaves) for index in range(metadata.num_row_groups)]


def read_parquet(item: WorkItem, options: ReaderOptions, on_bad: OnBad) -> Iterator[Document]:
    """Yield the documents of the item's row groups."""
    try:
        with _opened(item.path) as file:
            column = _column(file, item.path, options)
            is_text = column == options.text_column
            first_row = sum(file.metadata.row_group(index).num_rows for index in range(item.start))
            for group in range(item.start, file.metadata.num_row_groups if item.end < 0 else item.end):
                for number, value in enumerate(_values(file, group, column, item.path), first_row):
                    where = f"{item.path}, row {number}"
                    try:
                        yield _text(value, where, options) if is_text else _chat(value, where, column)
                    except DataError as error:
                        on_bad(error)
                first_row += file.metadata.row_group(group).num_rows
    except _DamagedError as error:
        on_bad(error)


class _DamagedError(DataError):
    """A Parquet file that cannot be read, or not to its end."""


def _text(value: Any, where: str, options: ReaderOptions) -> Document:
    raw = value.as_buffer() if value.is_valid else None
    if raw is None:
        raise DataError(
            f"{where}: column {options.text_column} is null; fill it, or leave such rows out (--on-bad-document skip)"
        )
    if raw.size > options.max_document_bytes:
        raise too_long(where, options)
    try:
        return Document(str(raw, "utf-8"), None, where)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 at byte {error.start} of its text ({error.reason}); mend the row, or leave it out"
            " (--on-bad-document skip)"
        ) from error


def _chat(value: Any, where: str, column: str) -> Document:
    try:
        turns = value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason}); mend the row, or leave it out") from error
    if not is_chat(turns):
        raise DataError(f"{where}: column {column} is no list of turns with role and content; fix this row")
    return Document(None, turns, where)


def _values(file: pq.ParquetFile, group: int, column: str, path: str) -> Iterator[Any]:
    """Yield the Arrow scalars of `column` in one row group."""
    import pyarrow as pa

    metadata = file.metadata.row_group(group)
    rows = max(1, min(_BATCH_ROWS, metadata.num_rows * _BATCH_BYTES // max(1, metadata.total_byte_size)))
    batches = file.iter_batches(batch_size=rows, row_groups=[group], columns=[column], use_threads=False)
    try:
        for batch in batches:
            values = batch.column(0)
            for name in column.split(".")[1:]:
                values = values.field(name)
            yield from values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    except (OSError, pa.ArrowException) as error:
        raise _DamagedError(
            f"{path}: row group {group} is damaged ({error}); restore the file, or leave out the rest of it"
            " (--on-bad-document skip)"
        ) from error


def _column(file: pq.ParquetFile, path: str, options: ReaderOptions) -> str:
    """Return the column to read: the text column, else the chat column.

    Raises:
        DataError: the file has neither, or the text column holds no text.
    """
    import pyarrow as pa

    schema = file.schema_arrow
    for column in (options.text_column, options.chat_column):
        kind = _type_of(schema, column)
        if kind is None:
            continue
        texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
        if column == options.text_column and not any(matches(kind) for matches in texts):
            raise _DamagedError(f"{path}: column {column} is no text but {kind}; name another with --text-column")
        return column
    raise _DamagedError(
        f"{path}: no column {options.text_column} or {options.chat_column} (found: {', '.join(schema.names)}); name"
        " the right one with --text-column or --chat-column, or leave the file out"
    )


def _type_of(schema: Any, column: str) -> Any:
    """Return the Arrow type of `column`, a dot reaching into a struct; None if there is none."""
    import pyarrow as pa

    first, *inner = column.split(".")
    kind = schema.field(first).type if schema.get_field_index(first) >= 0 else None
    for name in inner:
        if kind is None or not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind.value_type if kind is not None and pa.types.is_dictionary(kind) else kind


def _group_bytes(group: Any, leaves: list[int]) -> int:
    return sum(group.column(index).total_uncompressed_size for index in leaves)


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise _DamagedError(
            f"{path}: no whole Parquet file, damaged or cut short ({error}); restore it, or leave it out"
        ) from error
    except OSError as error:
        raise _DamagedError(str(unreadable(path, error))) from error
    with file:
        yield file
