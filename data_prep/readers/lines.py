"""Files of lines and files of text, plain or compressed, in memory that does not grow with the file.

A reader holds one block and at most one document: `_BLOCK` + 2 x `max_document_bytes`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

from data_prep.errors import DataError
from data_prep.readers.items import Document, OnBad, ReaderOptions, WorkItem, not_utf8, too_long, unreadable

_BLOCK = 2**20
_SMALL_BLOCK = 2**12  # where a file is damaged
_UTF8_MARK = b"\xef\xbb\xbf"  # the byte-order mark that some programs write first
_LINES_LOOKED_AT = 3  # to tell JSON lines from JSON
_ABSENT = object()


class DamagedFileError(DataError):
    """A file that stops making sense in the middle."""


class _Guarded:
    """A stream of bytes whose errors name the file and the place.

    Attributes:
        position: bytes that have been read.
    """

    def __init__(self, stream: Any, item: WorkItem) -> None:
        self._stream, self._item, self.position = stream, item, 0
        self._damage: OSError | None = None

    def seek(self, offset: int) -> None:
        self._stream.seek(offset)
        self.position = offset

    def read(self, size: int) -> bytes:
        block = b""
        if self._damage is None:
            try:
                block = self._stream.read(size)
            except OSError as error:
                self._damage = error
                block = self._before_damage()
        if self._damage is not None and not block:
            raise DamagedFileError(
                f"{self._item.path}: damaged or cut short after byte {self.position} of its text ({self._damage});"
                " restore the file, or leave out the rest of it (--on-bad-document skip)"
            ) from self._damage
        self.position += len(block)
        return block

    def _before_damage(self) -> bytes:
        """Return what can be read after `position`: a decompressor that fails keeps what it has decoded to itself."""
        if not self._item.compression:
            return b""
        pieces = []
        with _decompressed(self._item) as stream:
            left = self.position
            while left:
                left -= len(stream.read(min(left, _BLOCK)))
            with suppress(OSError):
                # Up to the same multiples from wherever a window begins, so that all see the same end.
                size = _SMALL_BLOCK - self.position % _SMALL_BLOCK
                while piece := stream.read(size):
                    pieces.append(piece)
                    size = _SMALL_BLOCK
        return b"".join(pieces)


def read_text(item: WorkItem, options: ReaderOptions, on_bad: OnBad) -> Iterator[Document]:
    """Yield the file as one document, its line ends and byte-order mark untouched; nothing if it is empty."""
    pieces: list[bytes] = []
    size = 0
    try:
        with _opened(item) as file:
            while block := file.read(_BLOCK):
                pieces.append(block)
                size += len(block)
                if size > options.max_document_bytes:
                    raise too_long(item.path, options)
        text = b"".join(pieces).decode("utf-8")
    except UnicodeDecodeError as error:
        on_bad(not_utf8(item.path, error.start, error.reason))
    except DataError as error:
        on_bad(error)
    else:
        if text:
            yield Document(text, None, item.path)


def read_lines(item: WorkItem, options: ReaderOptions, on_bad: OnBad) -> Iterator[Document]:
    """Yield the lines that begin in the item's range, each a document, without line ends; blank lines are none."""
    for offset, line in _lines(item, options, on_bad):
        where = f"{item.path}, line at byte {offset}"
        try:
            text = line.rstrip(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            on_bad(not_utf8(where, offset + error.start, error.reason))
        else:
            yield Document(text, None, where)


def read_jsonl(item: WorkItem, options: ReaderOptions, on_bad: OnBad) -> Iterator[Document]:
    """Yield the documents of the JSON lines that begin in the item's range."""
    from orjson import JSONDecodeError, loads  # at run time only: a fifth of the time of the standard library's

    text_field, chat_field = _field(options.text_column), _field(options.chat_column)
    for offset, line in _lines(item, options, on_bad):
        where = f"{item.path}, line at byte {offset}"
        try:
            try:
                record = loads(line)
            except JSONDecodeError:
                record = _loads_leniently(line, offset, where)
            text = text_field(record)
            if text.__class__ is str:
                yield Document(text, None, where)
            else:
                turns = chat_field(record) if text is _ABSENT else _ABSENT
                yield Document(None, _turns(record, text, turns, options, where), where)
        except DataError as error:
            on_bad(error)


def looks_like_jsonl(item: WorkItem, options: ReaderOptions) -> bool:
    """Whether of the first lines one is a JSON object with one of the columns, or two are objects of any kind.

    A line may be broken, or the column be missing in all: that is for the reader to say, not to be taken for text.
    """
    objects = 0
    for _, line in islice(_lines(item, options, lambda problem: None), _LINES_LOOKED_AT):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            objects += 1
            if any(_field(column)(record) is not _ABSENT for column in (options.text_column, options.chat_column)):
                return True
    return objects > 1


def text_per_byte(item: WorkItem) -> float:
    """Return how many bytes of text a byte of the file holds, measured on its first `_BLOCK` bytes; 1 if it is damaged.

    Only the cuts depend on it.
    """
    if not item.compression or not item.file_bytes:
        return 1.0
    import pyarrow as pa

    with open(item.path, "rb") as file:  # noqa: PTH123 - the path is a string here
        head = file.read(_BLOCK)
    text = 0
    with suppress(OSError), pa.CompressedInputStream(pa.BufferReader(head), item.compression) as stream:
        while piece := stream.read(_SMALL_BLOCK):
            text += len(piece)
    return max(text, len(head)) / len(head)


def _turns(record: Any, text: Any, turns: Any, options: ReaderOptions, where: str) -> list[dict[str, Any]]:
    """Return the turns of a chat record, or raise with what is wrong with it."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: no JSON object but {type(record).__name__}; one object a line is expected")
    if text is not _ABSENT:
        raise DataError(f"{where}: field {options.text_column} is no text but {type(text).__name__}; fix this record")
    if turns is _ABSENT:
        raise DataError(
            f"{where}: no field {options.text_column} or {options.chat_column} (found: {', '.join(map(str, record))});"
            " name the right one with --text-column or --chat-column"
        )
    if not is_chat(turns):
        raise DataError(f"{where}: field {options.chat_column} is no list of turns with role and content; fix it")
    assert isinstance(turns, list)
    return turns


def is_chat(value: Any) -> bool:
    """Whether `value` is a list of at least one turn, each an object with the texts `role` and `content`."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value
        )
    )


def _field(column: str) -> Callable[[Any], Any]:
    """Return a function from a record to the value of `column`, or `_ABSENT`; a dot reaches into an object."""
    names = column.split(".")

    def value(record: Any) -> Any:
        for name in names:
            if record.__class__ is not dict or name not in record:
                return _ABSENT
            record = record[name]
        return record

    return value


def _loads_leniently(line: bytes, offset: int, where: str) -> Any:
    """Parse with the standard library: it accepts NaN, and says where and why it fails."""
    try:
        text = line.decode("utf-8")
        record = json.loads(text)
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(where, offset + error.start, error.reason) from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: holds half of a surrogate pair, which is no text; fix or leave out this record"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply; fix or leave out this record") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: broken JSON at its character {error.pos} ({error.msg}); fix or leave it out"
        ) from error
    return record


def _lines(item: WorkItem, options: ReaderOptions, on_bad: OnBad) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line without its end) of the lines that begin in [start, end) and are not blank.

    Offsets count uncompressed bytes. A line above the limit goes to `on_bad`, and so does damage of the file, after
    which nothing follows.
    """
    file: _Guarded | None = None
    try:
        with _opened(item) as file:
            for offset, line in _long_lines(file, item, options.max_document_bytes):
                if line is None:
                    on_bad(too_long(f"{item.path}, line at byte {offset}", options))
                elif line and not line.isspace():
                    yield offset, line
    except DamagedFileError as damage:
        # Damage before the range is for the item in whose range it lies.
        if file is None or item.start <= file.position:
            on_bad(damage)


def _long_lines(file: _Guarded, item: WorkItem, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield every line that begins in the item's range, None in place of one longer than `limit`."""
    offset, block = _first_line(file, item)  # offset of the line that `held` begins
    held: list[bytes] = []
    size = 0  # of what belongs to the current line so far
    while block:
        if b"\n" not in block:
            size += len(block)
            held = [*held, block] if size <= limit else []
            block = file.read(_BLOCK)
            continue
        *lines, rest = block.split(b"\n")
        for line in lines:
            if 0 <= item.end <= offset:
                return
            length = size + len(line)
            yield offset, None if length > limit else (b"".join((*held, line)) if held else line)
            offset += length + 1
            held, size = [], 0
        held, size = ([rest], len(rest)) if rest else ([], 0)
        if size > limit:
            held = []
        block = file.read(_BLOCK)
    if size and not 0 <= item.end <= offset:
        yield offset, None if size > limit else b"".join(held)


def _first_line(file: _Guarded, item: WorkItem) -> tuple[int, bytes]:
    """Return the offset of the first line at or after the item's start, and a block that begins there."""
    if item.start == 0:
        block = file.read(_BLOCK)
        mark = len(_UTF8_MARK) if block.startswith(_UTF8_MARK) else 0
        return mark, block[mark:]
    # A line begins at `start` if the byte before it ends one.
    offset = item.start - 1
    if item.compression:
        behind = offset
        while behind:
            skipped = len(file.read(min(behind, _BLOCK)))
            if not skipped:
                return item.start, b""
            behind -= skipped
    else:
        file.seek(offset)
    while block := file.read(_BLOCK):
        found = block.find(b"\n")
        if found >= 0:
            rest = block[found + 1 :]
            return offset + found + 1, rest or file.read(_BLOCK)
        offset += len(block)
    return offset, b""


@contextmanager
def _opened(item: WorkItem) -> Iterator[_Guarded]:
    """Yield the file as a stream of uncompressed bytes."""
    if not item.compression:
        try:
            file = open(item.path, "rb", buffering=0)  # noqa: PTH123, SIM115 - a Path costs more than a short read
        except OSError as error:
            raise DamagedFileError(str(unreadable(item.path, error))) from error
        with file:
            yield _Guarded(file, item)
        return
    if item.file_bytes == 0:
        raise DamagedFileError(f"{item.path}: empty, which is no {item.compression} file; restore it or leave it out")
    with _decompressed(item) as stream:
        yield _Guarded(stream, item)


@contextmanager
def _decompressed(item: WorkItem) -> Iterator[Any]:
    import pyarrow as pa  # reads concatenated frames and, unlike others, notices a cut stream

    with pa.OSFile(item.path) as source, pa.CompressedInputStream(source, item.compression) as stream:
        yield stream
