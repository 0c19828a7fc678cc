"""The documents of a unit as they go into the encoder: read, filtered, and counted where they are left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from data_prep.config import BuildConfig
from data_prep.dedup import DuplicateRemover, Flags, Signatures
from data_prep.errors import DataError
from data_prep.filters import Filters
from data_prep.plan import Plan, Unit
from data_prep.readers import Document, read_item
from data_prep.split import is_held_out
from data_prep.world import World

_BATCH_SIZE = 2**20  # bytes or characters of text that go to the encoder at once
_MESSAGES_KEPT = 100  # of documents left out, of each unit


class LeftOut:
    """Counts what is left out of a unit, or changed, and keeps the first reasons.

    Attributes:
        counters: documents by reason.
        messages: why bad documents were skipped.
    """

    def __init__(self, config: BuildConfig) -> None:
        self.counters: Counter[str] = Counter()
        self.messages: list[str] = []
        self._skips = config.readers.on_bad_document == "skip"

    def on_bad(self, problem: DataError) -> None:
        """Skip a bad document, or raise `problem` where that is not allowed."""
        if not self._skips:
            raise problem
        self.counters["skipped"] += 1
        if len(self.messages) < _MESSAGES_KEPT:
            self.messages.append(str(problem))
        elif len(self.messages) == _MESSAGES_KEPT:
            self.messages.append("... and others in this unit of work, counted in the manifest")


def batches(documents: Iterable[Document], size_of: Callable[[Document], int]) -> Iterator[tuple[list[Document], int]]:
    """Yield documents in batches for the encoder, each with its size: the sum of `size_of`, about `_BATCH_SIZE`."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += size_of(document)
        if size >= _BATCH_SIZE:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def documents(unit: Unit, config: BuildConfig, flags: Flags | None, left_out: LeftOut) -> Iterator[Document]:
    """Yield the documents of `unit` that are to be encoded.

    Args:
        unit: what to read.
        config: how to read and filter.
        flags: what has been there before, from `find_duplicates`; None where nothing is deduplicated.
        left_out: counts the rest.

    Raises:
        DataError: a bad document that may not be skipped, or a user's filter failed.
    """
    mode = config.filters.deduplicate
    remover = None if flags is None else DuplicateRemover(mode, flags)
    for document in _filtered(unit, config, left_out):
        left = document
        if remover is not None:
            text = remover.apply(_signed_text(document, config))
            if text is None:
                continue
            if document.turns is None:
                left = document._replace(text=text)
        if config.validation_fraction == 0 or _is_in_split(left, config):
            yield left
        else:
            left_out.counters["other_split"] += 1
    if remover is not None:
        left_out.counters.update(remover.counters)


def find_duplicates(plan: Plan, config: BuildConfig, world: World) -> dict[int, Flags]:
    """Read the whole corpus, shared among the ranks; return the flags of the units that this rank has read.

    A collective.

    Raises:
        DataError: as for `documents`.
    """
    signatures = Signatures(config.filters.deduplicate)
    with world.guard("look for duplicates"):
        for unit in plan.units[world.rank :: world.size]:
            found = _filtered(unit, config, LeftOut(config))
            signatures.add_unit(unit.index, (_signed_text(document, config) for document in found))
    return signatures.find_duplicates(world)


def _filtered(unit: Unit, config: BuildConfig, left_out: LeftOut) -> Iterator[Document]:
    filters = Filters(config.filters)
    for item in unit.items:
        for document in read_item(item, config.readers, left_out.on_bad):
            try:
                left = _apply(filters, document)
            except DataError as error:
                raise DataError(f"{document.origin}: {error}") from error
            if left is None:
                continue
            if left.text or left.turns:
                yield left
            else:
                left_out.counters["empty"] += 1
    left_out.counters.update(filters.counters)


def _apply(filters: Filters, document: Document) -> Document | None:
    if document.turns is not None:
        turns = filters.apply_to_turns(document.turns)
        return None if turns is None else document._replace(turns=turns)
    assert document.text is not None
    text = filters.apply(document.text)
    return None if text is None else document._replace(text=text)


def _signed_text(document: Document, config: BuildConfig) -> str:
    """Return the text by which a document is known again; chats are compared as a whole, never by lines."""
    if document.text is not None:
        return document.text
    return json.dumps(document.turns) if config.filters.deduplicate == "documents" else ""


def _is_in_split(document: Document, config: BuildConfig) -> bool:
    text = document.text if document.text is not None else json.dumps(document.turns)
    return is_held_out(text, config.validation_fraction) == (config.split == "validation")
