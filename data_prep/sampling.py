"""A weighted sample of a corpus, for training a tokenizer on: a share for every source, from all over it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_prep.errors import DataError
from data_prep.readers import Document, ReaderOptions, WorkItem, read_item
from data_prep.readers.items import OnBad, fail

LONGEST_TEXT = 32_768  # characters of a document, as in the reference: one that repeats itself counts no more
_PLACES = 64  # work items of a source that its share comes from, if it has as many


@dataclass(frozen=True)
class Source:
    """A part of a corpus that has a name.

    Attributes:
        name: what reports call it.
        items: what it consists of, see `data_prep.readers.plan_items`.
        weight: its share of a sample, relative to other sources.
    """

    name: str
    items: Sequence[WorkItem]
    weight: float = 1.0


class CorpusSample:
    """The documents of a sample, each time it is iterated; they depend on the sources, the size and the seed alone.

    Attributes:
        taken: characters taken from each source so far, by name. Less than its share where a source is too small.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        characters: int,
        options: ReaderOptions | None = None,
        *,
        seed: int = 0,
        on_bad: OnBad = fail,
    ) -> None:
        """Take `characters` from `sources` by weight; bad documents go to `on_bad`, see `read_item`.

        Raises:
            DataError: two sources of one name, or a weight that is no share.
        """
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise DataError(f"sources {', '.join(names)}: each needs a name of its own")
        for source in sources:
            if not 0 <= source.weight < float("inf"):
                raise DataError(f"source {source.name}: weight {source.weight} is not a number from 0 up")
        if not sum(source.weight for source in sources):
            raise DataError(f"sources {', '.join(names)}: none has a weight above 0, so that nothing can be sampled")
        self._sources, self._characters, self._seed = sources, characters, seed
        self._options, self._on_bad = options or ReaderOptions(), on_bad
        self.taken: Counter[str] = Counter()

    def __iter__(self) -> Iterator[str]:
        self.taken = Counter()
        weights = sum(source.weight for source in self._sources)
        for source in self._sources:
            share = int(self._characters * source.weight / weights)
            for text in self._texts(source, share):
                self.taken[source.name] += len(text)
                yield text

    def _texts(self, source: Source, left: int) -> Iterator[str]:
        """Yield `left` characters of documents, from work items in a random order, an equal part from each.

        What an item lacks of its part is made up for by the items that follow.
        """
        # Drawn by place in the source, not by path: a corpus that has moved gives the same sample.
        order = sorted(range(len(source.items)), key=lambda index: self._lot(source.name, index))
        for number, item in enumerate(source.items[index] for index in order):
            if left <= 0:
                return
            wanted = left / max(1, min(len(order), _PLACES) - number)
            for document in read_item(item, self._options, self._on_bad):
                text = plain_text(document)[: min(LONGEST_TEXT, left)]
                yield text
                left -= len(text)
                wanted -= len(text)
                if wanted <= 0:
                    break

    def _lot(self, name: str, index: int) -> bytes:
        return hashlib.blake2b(f"{self._seed}/{name}/{index}".encode()).digest()


def plain_text(document: Document) -> str:
    """Return a document as text; of a chat, what was said, a line each."""
    if document.text is not None:
        return document.text
    return "\n".join(turn["content"] for turn in document.turns or ())
