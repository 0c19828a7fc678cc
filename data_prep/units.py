"""One unit of work: its documents are read, filtered, encoded, packed into rows and written as a part."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.chat import ChatFormat
from data_prep.config import BuildConfig
from data_prep.dedup import Flags
from data_prep.documents import LeftOut, batches, documents
from data_prep.engine import Engine
from data_prep.errors import DataError
from data_prep.filters import Filters
from data_prep.manifest import Part, smallest_dtype
from data_prep.packing import Ids, Mask, Packer
from data_prep.plan import Unit
from data_prep.readers import Document
from data_prep.shards import part_name, write_part
from data_prep.tokenizer import Tokenizer
from data_prep.workspace import Workspace

# A part is finished early when it has twice the tokens to be expected of a unit, but not for a little: this bounds the
# memory of a rank where a compressed file holds more than its size promised.
_TOKENS_PER_BYTE_AT_MOST = 0.5
_SMALLEST_LIMIT = 2**20  # tokens


@dataclass(frozen=True)
class UnitResult:
    """What became of one unit.

    Attributes:
        parts: what was written; none if the unit filled no row.
        documents, dropped_tokens, padding_tokens, split_documents, text_bytes, counters: see `Manifest`.
        messages: why documents were left out, one message each, the first ones.
    """

    parts: tuple[Part, ...]
    documents: int
    dropped_tokens: int
    padding_tokens: int
    split_documents: int
    text_bytes: int
    counters: Mapping[str, int]
    messages: tuple[str, ...]

    def as_record(self) -> dict[str, Any]:
        """Return the result as JSON stores it."""
        return {**vars(self), "parts": [vars(part) for part in self.parts], "counters": dict(self.counters)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> UnitResult:
        """Return the result that `as_record` has made."""
        parts, messages = tuple(Part(**part) for part in record["parts"]), tuple(record["messages"])
        return cls(**{**record, "parts": parts, "messages": messages})


def pack_counts(counts: npt.NDArray[np.int64]) -> str:
    """Return counts, shape (n,), as text that JSON can hold."""
    return base64.b64encode(zlib.compress(counts.astype("<i8").tobytes(), level=1)).decode()


def unpack_counts(packed: str) -> npt.NDArray[np.int64]:
    """Return the counts that `pack_counts` has packed."""
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype="<i8")


@dataclass(frozen=True)
class Recipe:
    """What makes rows of documents.

    Attributes:
        config: see there.
        sequence_length: tokens that a row trains on; a row holds one more.
        tokenizer_dir: its directory, which may hold a chat template too.
        tokenizer: knows the control tokens.
        engine: encodes text.
    """

    config: BuildConfig
    sequence_length: int
    tokenizer_dir: Path
    tokenizer: Tokenizer
    engine: Engine


class UnitBuilder:
    """Encodes units, one after another, on one rank."""

    def __init__(self, recipe: Recipe, workspace: Workspace) -> None:
        self._recipe, self._workspace = recipe, workspace
        self._chat: ChatFormat | None = None  # needed, and looked for, only where there are chats

    def encode(self, unit: Unit, flags: Flags | None, on_batch: Callable[[int], None]) -> Encoded:
        """Read, filter and encode `unit`.

        Args:
            unit: what to build. The caller holds the claim on it.
            flags: its duplicates, see `data_prep.documents`; None where nothing is deduplicated.
            on_batch: called after every batch with the bytes of text of this unit that are done, at most `unit.bytes`.

        Raises:
            DataError: a bad document, a changed file, or nothing can be written.
        """
        config = self._recipe.config
        left_out, filters = LeftOut(config), Filters(config.filters)
        writer = _PartWriter(self._recipe, self._workspace, unit)
        count = text_bytes = 0
        for batch, size in batches(documents(unit, config, flags, left_out), _text_bytes):
            encoded = self._encode(batch, left_out)
            for (ids, trainable), is_kept in zip(encoded, filters.keep([ids for ids, _ in encoded]), strict=True):
                if is_kept:
                    writer.add(ids, trainable)
                    count += 1
            text_bytes += size
            on_batch(min(text_bytes, unit.bytes))
        left_out.counters.update(filters.counters)
        return Encoded(writer, count, text_bytes, left_out)

    def _encode(self, batch: Sequence[Document], left_out: LeftOut) -> list[tuple[Ids, Mask | None]]:
        """Return the ids of each document, begin and end included, and for chats which of them are trained on."""
        texts = iter(self._recipe.engine.encode_batch([each.text for each in batch if each.text is not None]))
        encoded: list[tuple[Ids, Mask | None]] = []
        for document in batch:
            if document.turns is None:
                encoded.append((self._with_control_tokens(next(texts)), None))
                continue
            chat = self._chat_format()
            try:
                encoded.append(chat.encode(document.turns))
            except DataError as error:
                left_out.on_bad(DataError(f"{document.origin}: {error}"))
        return encoded

    def _chat_format(self) -> ChatFormat:
        if self._chat is None:
            recipe = self._recipe
            self._chat = ChatFormat.load(recipe.tokenizer_dir, recipe.tokenizer, recipe.config.train_on)
        return self._chat

    def _with_control_tokens(self, ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        document = np.empty(len(ids) + 2, dtype=np.uint32)
        tokenizer = self._recipe.tokenizer
        document[0], document[1:-1], document[-1] = tokenizer.begin_id, ids, tokenizer.end_id
        return document


class Encoded:
    """A unit that has been read: its tokens are in memory, and what is left is to pack and to write them."""

    def __init__(self, writer: _PartWriter, documents: int, text_bytes: int, left_out: LeftOut) -> None:
        self._writer, self._documents, self._text_bytes, self._left_out = writer, documents, text_bytes, left_out

    def write(self) -> tuple[UnitResult, npt.NDArray[np.int64]]:
        """Write the parts; return what became of the unit and how often each token is stored, shape (vocab_size,).

        Raises:
            DataError: nothing can be written.
        """
        writer, left_out = self._writer, self._left_out
        writer.finish()
        result = UnitResult(
            parts=tuple(writer.parts),
            documents=self._documents,
            dropped_tokens=writer.dropped_tokens,
            padding_tokens=writer.padding_tokens,
            split_documents=writer.split_documents,
            text_bytes=self._text_bytes,
            counters={name: number for name, number in sorted(left_out.counters.items()) if number},
            messages=tuple(left_out.messages),
        )
        return result, writer.histogram


class _PartWriter:
    """Packs the documents of one unit and writes its parts."""

    def __init__(self, recipe: Recipe, workspace: Workspace, unit: Unit) -> None:
        self.parts: list[Part] = []
        self.dropped_tokens = self.padding_tokens = self.split_documents = 0
        self.histogram = np.zeros(recipe.tokenizer.vocab_size, dtype=np.int64)
        self._recipe, self._workspace = recipe, workspace
        self._name = part_name(unit.index)
        self._token_limit = max(int(unit.planned_bytes * _TOKENS_PER_BYTE_AT_MOST), _SMALLEST_LIMIT)
        self._tokens = 0  # in the packer
        self._packer = self._new_packer()

    def add(self, ids: npt.NDArray[np.uint32], trainable: npt.NDArray[np.bool_] | None = None) -> None:
        """Add one document, its begin and end included."""
        self._packer.add(ids, trainable)
        self._tokens += len(ids)
        if self._tokens >= self._token_limit:
            self.finish()
            self._packer, self._tokens = self._new_packer(), 0

    def finish(self) -> None:
        """Write what has been packed since the last part."""
        packed = self._packer.finish()
        self.dropped_tokens += packed.dropped_tokens
        self.padding_tokens += packed.padding_tokens
        self.split_documents += packed.split_documents
        if not len(packed.rows):
            return
        name = f"{self._name}-{len(self.parts):03d}" if self.parts else self._name
        self._workspace.forget_part(name)
        with self._workspace.writing():
            self.parts.append(write_part(self._workspace.data, name, packed.rows, packed.trainable))
        self.histogram += np.bincount(packed.rows.ravel(), minlength=len(self.histogram))

    def _new_packer(self) -> Packer:
        config, tokenizer = self._recipe.config, self._recipe.tokenizer
        return Packer(
            self._recipe.sequence_length + 1,
            config.packing,
            tokenizer.pad_id,
            dtype=smallest_dtype(tokenizer.vocab_size),
            drop_cut_tails=config.drop_cut_tails,
        )


def _text_bytes(document: Document) -> int:
    if document.turns is not None:
        return sum(len(str(turn["content"]).encode()) for turn in document.turns)
    assert document.text is not None
    return len(document.text) if document.text.isascii() else len(document.text.encode())
