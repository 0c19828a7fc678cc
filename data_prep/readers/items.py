"""What readers give and take: a document, a piece of work, and the options of reading."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from data_prep.errors import DataError

Turn = dict[str, Any]
OnBad = Callable[[DataError], None]

MEBIBYTE = 2**20


class Document(NamedTuple):
    """One document of a corpus.

    Attributes:
        text: its text, or None for chat.
        turns: its turns of chat, objects with `role` and `content`, or None for text.
        origin: where it comes from, for messages: the file, and the line or row in it.
    """

    text: str | None
    turns: list[Turn] | None
    origin: str


@dataclass(frozen=True)
class WorkItem:
    """A file or a range of one, read by one rank from beginning to end.

    Attributes:
        path: the file, absolute.
        format: "text" (the file is one document), "lines" (a line is one), "jsonl" (a line holds one) or "parquet".
        compression: "gzip", "zstd", or "" for none.
        start, end: what to read: row groups of a Parquet file; the bytes in which lines begin, uncompressed, `end`
            -1 for the rest; 0 and -1 for a text file.
        bytes: text to expect, bytes: an estimate for compressed and Parquet files.
        file_bytes, modified: size and modification time (ns) of the file when it was planned.
    """

    path: str
    format: str
    compression: str
    start: int
    end: int
    bytes: int
    file_bytes: int
    modified: int


@dataclass(frozen=True)
class ReaderOptions:
    """How corpora are read.

    Attributes:
        text_column: field of a JSON line or column of a Parquet file that holds the text; dots reach into objects.
        chat_column: field or column that holds the turns of a chat, used where there is no `text_column`.
        text_documents: whether a plain text file is one document, or each of its lines that is not blank.
        max_document_bytes: a longer document is a bad one. It bounds the memory of a reader.
        on_bad_document: whether a document that cannot be used ends the build, or is counted and left out.
    """

    text_column: str = "text"
    chat_column: str = "messages"
    text_documents: Literal["file", "lines"] = "file"
    max_document_bytes: int = 64 * MEBIBYTE
    on_bad_document: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        for name, allowed in (("text_documents", ("file", "lines")), ("on_bad_document", ("fail", "skip"))):
            if getattr(self, name) not in allowed:
                raise DataError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.max_document_bytes < 1:
            raise DataError(f"max_document_bytes: {self.max_document_bytes} leaves no room for any document")


def fail(problem: DataError) -> None:
    """Raise `problem`: the handler of bad documents that skips none."""
    raise problem


def too_long(where: str, options: ReaderOptions) -> DataError:
    """Return the error for a document above the limit."""
    return DataError(
        f"{where}: longer than max_document_bytes = {options.max_document_bytes}; split the document, raise the limit,"
        " or leave it out (--on-bad-document skip)"
    )


def not_utf8(where: str, offset: int, reason: str) -> DataError:
    """Return the error for bytes that are not UTF-8; `offset` counts from the beginning of the file."""
    return DataError(
        f"{where}: not UTF-8 at byte {offset} ({reason}); convert the file (iconv -t utf-8), or leave the document"
        " out (--on-bad-document skip)"
    )


def unreadable(path: str, error: OSError) -> DataError:
    """Return the error for a file that the system cannot read."""
    return DataError(f"{path}: cannot be read ({error.strerror or error}); fix it or leave it out of --input")


def refuse_changed(item: WorkItem) -> None:
    """Raise a DataError if the file of `item` is not the one that was planned."""
    try:
        now = os.stat(item.path)  # noqa: PTH116 - for a path that is a string
    except OSError as error:
        raise unreadable(item.path, error) from error
    if (now.st_size, now.st_mtime_ns) != (item.file_bytes, item.modified):
        raise DataError(
            f"{item.path}: changed since the build was planned; leave inputs alone while a build runs, and start it"
            " again"
        )
