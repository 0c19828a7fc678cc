"""A dataset's table of contents: `manifest.json`, the only file that a reader needs before its first row."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from data_prep.errors import DataError

MANIFEST_FILE = "manifest.json"
SHARD_FILE = "c.0.0"
FORMAT = "rookery-dataset"
SCHEMA_VERSION = 2

_REBUILD = "the manifest was changed or damaged: restore it, or rebuild with `rookery data build`"
_ITEM_BYTES = {"uint16": 2, "uint32": 4}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART_NAME = re.compile(r"part-[0-9]+(-[0-9]+)?")

T = TypeVar("T")


def smallest_dtype(vocab_size: int) -> str:
    """Return the name of the smallest unsigned type on disk that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


@dataclass(frozen=True)
class Part:
    """One array of rows.

    Attributes:
        path: name of the part's directory inside the dataset.
        rows: number of rows, at least 1.
        bytes: size of its shard file.
        sha256: hex digest of its shard file.
        last_row_crc32c: checksum of its last row: a reader knows by it that an open shard is the one meant.
        mask_bytes, mask_sha256: the same of the shard of its loss masks; 0 and "" if all of its tokens are trained on.
    """

    path: str
    rows: int
    bytes: int
    sha256: str
    last_row_crc32c: int
    mask_bytes: int = 0
    mask_sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a dataset holds. Equal for equal input, however many ranks wrote it.

    Attributes:
        sequence_length: tokens that a row trains on; a row stores one more, the last target.
        dtype: "uint16" or "uint32", the type of a token on disk (little endian).
        tokenizer_sha256: digest of the tokenizer.json that encoded it.
        vocab_size: number of tokens of that tokenizer.
        special_ids: ids of its control tokens by name.
        documents: number of documents that were encoded.
        dropped_tokens: tokens that are in no row, such as those at the end of a part that fill none.
        text_bytes: bytes of UTF-8 text that were encoded.
        unigram_entropy: entropy of the distribution of the stored tokens, nats per token.
        parts: the arrays, in the order of their rows.
        packing: how documents were laid into rows, see `data_prep.packing`.
        padding_tokens: tokens in rows that belong to no document.
        split_documents: documents that are in several rows, or in rows only in part.
        counters: documents that were left out or changed, by reason: `empty`, `skipped` (bad ones), and those of the
            filters.
        provenance: what the dataset was made of: `inputs`, `files`, `file_bytes`, `settings`, and `plan_sha256`, the
            digest of plan.json. No part of the fingerprint.
    """

    sequence_length: int
    dtype: str
    tokenizer_sha256: str
    vocab_size: int
    special_ids: Mapping[str, int]
    documents: int
    dropped_tokens: int
    text_bytes: int
    unigram_entropy: float
    parts: tuple[Part, ...]
    packing: str = "concatenate"
    padding_tokens: int = 0
    split_documents: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def control_ids(self) -> tuple[int, int, int]:
        """Ids of begin, end and pad: `special_ids` has them in this order, as `Tokenizer.special_ids` does."""
        begin_id, end_id, pad_id = self.special_ids.values()
        return begin_id, end_id, pad_id

    @property
    def row_tokens(self) -> int:
        """Tokens in a row: `sequence_length` + 1."""
        return self.sequence_length + 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk, without its checksum."""
        return self.row_tokens * _ITEM_BYTES[self.dtype]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The type of a token on disk, little endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @cached_property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def tokens(self) -> int:
        """Tokens stored: `rows` * `row_tokens`."""
        return self.rows * self.row_tokens

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the content: a sha256 over the tokenizer, the row length and every shard, in order.

        Independent of names and paths, of the number of ranks that built the dataset, and of where it lies.
        """
        content = [FORMAT, self.tokenizer_sha256, self.sequence_length, self.dtype]
        content += [[part.rows, part.sha256, part.last_row_crc32c, part.mask_sha256] for part in self.parts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def as_record(self) -> dict[str, Any]:
        """Return the manifest as JSON stores it."""
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "sequence_length": self.sequence_length,
            "row_tokens": self.row_tokens,
            "dtype": self.dtype,
            "tokenizer": {
                "sha256": self.tokenizer_sha256,
                "vocab_size": self.vocab_size,
                "special_ids": dict(self.special_ids),
            },
            "documents": self.documents,
            "rows": self.rows,
            "tokens": self.tokens,
            "dropped_tokens": self.dropped_tokens,
            "packing": self.packing,
            "padding_tokens": self.padding_tokens,
            "split_documents": self.split_documents,
            "counters": dict(self.counters),
            "text_bytes": self.text_bytes,
            "unigram_entropy": self.unigram_entropy,
            "provenance": dict(self.provenance),
            "parts": [vars(part) for part in self.parts],
        }

    def write(self, directory: Path) -> None:
        """Write `directory`/manifest.json; `directory` is not published yet, so that the name needs no care."""
        (directory / MANIFEST_FILE).write_bytes(self.as_bytes())

    def as_bytes(self) -> bytes:
        """Return the content of manifest.json."""
        return (json.dumps(self.as_record(), indent=1) + "\n").encode()

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read the manifest of a dataset and see that every part is there in full size (one stat a part).

        For one rank: the others get it by broadcast.

        Raises:
            DataError: no dataset there, or its manifest or a part is missing, damaged or of another version.
        """
        manifest = cls.read(directory)
        for part in manifest.parts:
            problem = part_problem(directory, part)
            if problem is not None:
                raise DataError(f"{problem}; restore it, or rebuild with `rookery data build`")
        return manifest

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read and check `directory`/manifest.json alone, as `load` does but without looking for the parts."""
        path = directory / MANIFEST_FILE
        if not directory.is_dir():
            raise DataError(f"{directory}: no such dataset directory; make one with `rookery data build`")
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise DataError(f"{path}: missing, so this is no dataset; make one with `rookery data build`") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); {_REBUILD}") from error
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: broken JSON at line {error.lineno} ({error.msg}); {_REBUILD}") from error
        except RecursionError:
            raise DataError(f"{path}: JSON nested beyond all measure; {_REBUILD}") from None
        return _parse(record, str(path))


def part_problem(directory: Path, part: Part) -> str | None:
    """Say what is wrong with the presence or size of a part's shard file, or None."""
    shard = directory / part.path / SHARD_FILE
    try:
        size = shard.stat().st_size
    except OSError as error:
        return f"{shard}: this shard of the dataset is missing ({error.strerror})"
    if size != part.bytes:
        return f"{shard}: {size} bytes, but the manifest says {part.bytes}"
    return None


class _Record:
    """One JSON object of a manifest: takes fields out with their type checked, and complains by field and file."""

    def __init__(self, value: object, where: str, prefix: str = "") -> None:
        self._where, self._prefix = where, prefix
        if not isinstance(value, dict):
            raise DataError(f"{where}: field {prefix.rstrip('.') or '(whole file)'} is no JSON object; {_REBUILD}")
        self._left: dict[str, object] = dict(value)

    def take(self, name: str, kind: type[T]) -> T:
        if name not in self._left:
            raise DataError(f"{self._where}: field {self._prefix}{name} is missing; {_REBUILD}")
        value = self._left.pop(name)
        if isinstance(value, bool) or not isinstance(value, kind):
            self.refuse(name, value, f"should be of type {kind.__name__}")
        return value

    def take_count(self, name: str, minimum: int = 0) -> int:
        value = self.take(name, int)
        if value < minimum:
            self.refuse(name, value, f"should be at least {minimum}")
        return value

    def take_sha256(self, name: str) -> str:
        value = self.take(name, str)
        if not _SHA256.fullmatch(value):
            self.refuse(name, value, "should be a sha256 in hex")
        return value

    def expect(self, name: str, expected: int | str) -> None:
        value = self.take(name, type(expected))
        if value != expected:
            self.refuse(name, value, f"should be {expected!r}")

    def names(self) -> list[str]:
        return list(self._left)

    def child(self, name: str) -> _Record:
        return _Record(self.take(name, dict), self._where, f"{self._prefix}{name}.")

    def end(self) -> None:
        for name, value in self._left.items():
            self.refuse(name, value, "is unknown")

    def refuse(self, name: str, value: object, complaint: str) -> NoReturn:
        raise DataError(f"{self._where}: field {self._prefix}{name} = {value!r} {complaint}; {_REBUILD}")


def _parse(value: object, where: str) -> Manifest:
    record = _Record(value, where)
    record.expect("format", FORMAT)
    version = record.take("schema_version", int)
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{where}: field schema_version = {version}, but this rookery reads version {SCHEMA_VERSION}; use the"
            " rookery that built the dataset, or rebuild it with `rookery data build`"
        )
    tokenizer = record.child("tokenizer")
    vocab_size = tokenizer.take_count("vocab_size", minimum=1)
    special, counters = tokenizer.child("special_ids"), record.child("counters")
    manifest = Manifest(
        sequence_length=record.take_count("sequence_length", minimum=1),
        dtype=smallest_dtype(vocab_size),
        tokenizer_sha256=tokenizer.take_sha256("sha256"),
        vocab_size=vocab_size,
        special_ids={name: special.take_count(name) for name in special.names()},
        documents=record.take_count("documents"),
        dropped_tokens=record.take_count("dropped_tokens"),
        text_bytes=record.take_count("text_bytes"),
        unigram_entropy=record.take("unigram_entropy", float),
        parts=tuple(
            _parse_part(_Record(part, where, f"parts[{index}]."))
            for index, part in enumerate(record.take("parts", list))
        ),
        packing=record.take("packing", str),
        padding_tokens=record.take_count("padding_tokens"),
        split_documents=record.take_count("split_documents"),
        counters={name: counters.take_count(name) for name in counters.names()},
        provenance=record.take("provenance", dict),
    )
    for name, token_id in manifest.special_ids.items():
        if token_id >= vocab_size:
            special.refuse(name, token_id, f"should be below vocab_size = {vocab_size}")
    if not manifest.parts:
        record.refuse("parts", [], "should not be empty")
    if not math.isfinite(manifest.unigram_entropy) or manifest.unigram_entropy < 0:
        record.refuse("unigram_entropy", manifest.unigram_entropy, "should be finite and not negative")
    record.expect("dtype", manifest.dtype)
    record.expect("row_tokens", manifest.row_tokens)
    record.expect("rows", manifest.rows)
    record.expect("tokens", manifest.tokens)
    record.expect("fingerprint", manifest.fingerprint)
    tokenizer.end()
    record.end()
    return manifest


def _parse_part(record: _Record) -> Part:
    part = Part(
        path=record.take("path", str),
        rows=record.take_count("rows", minimum=1),
        bytes=record.take_count("bytes", minimum=1),
        sha256=record.take_sha256("sha256"),
        last_row_crc32c=record.take_count("last_row_crc32c"),
        mask_bytes=record.take_count("mask_bytes"),
        mask_sha256=record.take("mask_sha256", str),
    )
    if not _PART_NAME.fullmatch(part.path):  # a path from a file is never followed out of the dataset
        record.refuse("path", part.path, "should look like part-00000")
    record.end()
    return part
