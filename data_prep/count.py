"""How many tokens each source of a corpus is, before it is built: what mixtures and budgets are planned with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep.chat import ChatFormat
from data_prep.documents import batches
from data_prep.engine import Engine, agree_on_engine
from data_prep.errors import DataError
from data_prep.readers import ReaderOptions, WorkItem, read_item
from data_prep.sampling import Source, plain_text
from data_prep.tokenizer import Tokenizer
from data_prep.world import World

_SAMPLED_DOCUMENTS = 8  # of a source, to choose the encoder by


@dataclass(frozen=True)
class SourceCount:
    """What a source holds.

    Attributes:
        name: of the source.
        documents: those that can be read.
        skipped: those that cannot.
        tokens: of all documents, a begin and an end for each included.
        text_bytes: UTF-8 bytes of text; of chats, what was said.
    """

    name: str
    documents: int
    skipped: int
    tokens: int
    text_bytes: int


def count_tokens(
    sources: Sequence[Source],
    tokenizer_dir: Path,
    options: ReaderOptions,
    world: World,
    *,
    engine: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[SourceCount]:
    """Encode every document of `sources` and count; a collective that gives every rank the counts of all.

    Args:
        sources: the same on every rank.
        tokenizer_dir: directory of a tokenizer.json.
        options: how files are read. Where they say `on_bad_document: skip`, bad documents are counted.
        world: the ranks that share the work items.
        engine: see `choose_engine`.
        progress: called on every rank with (bytes done, bytes in all) of that rank's share.

    Raises:
        DataError: a bad document, tokenizer or engine; the same message on every rank.
    """
    totals = np.zeros((len(sources), 4))
    with world.guard("sample the corpus"):
        sample = _sample(sources, options)
    encoder = agree_on_engine(tokenizer_dir, sample, engine, world)
    with world.guard("count tokens"):
        tokenizer = Tokenizer.load(tokenizer_dir)
        counter = _Counter(encoder, tokenizer, tokenizer_dir, options)
        share = _share(sources, world)
        bytes_total, bytes_done = sum(item.bytes for _, item in share), 0
        for source, item in share:
            totals[source] += counter.count(item)
            bytes_done += item.bytes
            if progress is not None:
                progress(bytes_done, bytes_total)
    totals = world.sum(totals)
    return [
        SourceCount(source.name, *(int(total) for total in row)) for source, row in zip(sources, totals, strict=True)
    ]


def _share(sources: Sequence[Source], world: World) -> list[tuple[int, WorkItem]]:
    """Return the work items of this rank, each with the number of its source."""
    items = [(number, item) for number, source in enumerate(sources) for item in source.items]
    items.sort(key=lambda entry: -entry[1].bytes)
    return items[world.rank :: world.size]


def _sample(sources: Sequence[Source], options: ReaderOptions) -> list[str]:
    documents = (
        document
        for source in sources
        for item in source.items[:1]
        for document in islice(read_item(item, options, _ignore), _SAMPLED_DOCUMENTS)
    )
    return [plain_text(document) for document in documents]


def _ignore(problem: DataError) -> None:
    """Leave a bad document to the pass that counts it."""


class _Counter:
    """Counts the documents, skipped documents, tokens and bytes of work items."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, tokenizer_dir: Path, options: ReaderOptions) -> None:
        self._engine, self._tokenizer, self._tokenizer_dir, self._options = engine, tokenizer, tokenizer_dir, options
        self._chat: ChatFormat | None = None
        self._skipped = 0

    def count(self, item: WorkItem) -> tuple[int, int, int, int]:
        documents = tokens = text_bytes = 0
        self._skipped = 0
        for batch, _ in batches(read_item(item, self._options, self._on_bad), lambda each: len(plain_text(each))):
            texts = [document.text for document in batch if document.text is not None]
            chats = [document.turns for document in batch if document.turns is not None]
            documents += len(batch)
            tokens += sum(len(ids) + 2 for ids in self._engine.encode_batch(texts))
            tokens += sum(len(self._chat_format().encode(turns)[0]) for turns in chats)
            text_bytes += sum(len(plain_text(document).encode()) for document in batch)
        return documents, self._skipped, tokens, text_bytes

    def _chat_format(self) -> ChatFormat:
        if self._chat is None:  # a tokenizer needs no template as long as there is no chat
            self._chat = ChatFormat.load(self._tokenizer_dir, self._tokenizer, train_on="all")
        return self._chat

    def _on_bad(self, problem: DataError) -> None:
        if self._options.on_bad_document == "fail":
            raise problem
        self._skipped += 1
