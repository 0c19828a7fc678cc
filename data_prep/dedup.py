"""What has been there before: exact deduplication of documents, and of spans of lines or sentences, across all ranks.

The first occurrence in the order of the corpus stays, whatever the number of ranks. The corpus is read twice: first for
the signatures of its texts (16 bytes each), which are shared out among the ranks by their value, so that equal ones
meet on one rank; then to build.

- `documents`: a document equal to an earlier one is left out.
- `lines`, `sentences`: as the reference does (datatrove's sentence deduplication after C4, Raffel et al. 2020, section
  2.2): of a span of three that has been there before, all three are taken out; a document that is left with at most
  50 words goes altogether. Spans are compared by their words, without case, accents, punctuation, and with every
  number alike; spans without a word are not compared. Sentences end at `.!?` with a blank after, or at a line end.

Memory of a rank: about 80 bytes for each signature of the texts that it reads, and about 150 MB while they are
exchanged. Of signatures that are equal on one rank only the first is sent, so that no rank drowns in a text that comes
a million times.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_prep.world import World

Mode = Literal["none", "documents", "lines", "sentences"]
MODES: tuple[Mode, ...] = ("none", "documents", "lines", "sentences")
SPAN = 3  # lines or sentences that are compared together
FEWEST_WORDS = 50

Flags = npt.NDArray[np.bool_]

_DIGEST_BYTES = 16  # two texts of a trillion collide by chance with a probability of 1e-15
_NOTHING = bytes(_DIGEST_BYTES)  # the signature that equals no other
_PER_ROUND = 2**20  # signatures that a rank sends at once

_ENDS: dict[Mode, re.Pattern[str]] = {
    "lines": re.compile(r"\n+"),
    # Looking back, and no giving back, so that a long row of dots is read once.
    "sentences": re.compile(r"(?<![.!?])[.!?]++[\"')\]]*+\s+|\n\s*"),
}
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+")
_ACCENT = re.compile(r"[\u0300-\u036f]")


class Signatures:
    """Collects the signatures of the documents that one rank reads, unit by unit."""

    def __init__(self, mode: Mode) -> None:
        """Start with no documents; `mode` is not "none"."""
        self._mode = mode
        self._digests = bytearray()
        self._units: list[tuple[int, int]] = []  # unit, its number of signatures

    def add_unit(self, unit: int, texts: Iterable[str]) -> None:
        """Read all documents, in order, of the unit of work that is number `unit` in the order of the corpus."""
        before = len(self._digests)
        for text in texts:
            self._digests += b"".join(_signatures(text, self._mode))
        self._units.append((unit, (len(self._digests) - before) // _DIGEST_BYTES))

    def find_duplicates(self, world: World) -> dict[int, Flags]:
        """Return, for each unit added on this rank, which of its signatures have an equal one before them.

        A collective, for all units of the corpus, each added on one rank. The flags are for `DuplicateRemover`.
        """
        digests = np.frombuffer(self._digests, "<u8").reshape(-1, 2)
        places = [np.arange(count, dtype=np.uint64) + np.uint64(unit << 32) for unit, count in self._units]
        flags = _repeated(digests, np.concatenate([np.empty(0, np.uint64), *places]), world)
        bounds = np.cumsum([count for _, count in self._units])[:-1]
        return {unit: part for (unit, _), part in zip(self._units, np.split(flags, bounds), strict=False)}


class DuplicateRemover:
    """Takes what has been there before out of the documents of one unit.

    Attributes:
        counters: documents left out (`duplicate_documents`), documents changed and the spans taken out of them.
    """

    def __init__(self, mode: Mode, flags: Flags) -> None:
        """Take the flags that `Signatures.find_duplicates` gave for the unit."""
        self._mode, self._flags, self._used = mode, flags, 0
        self.counters: Counter[str] = Counter()

    def apply(self, text: str) -> str | None:
        """Return what is left of the unit's next document, or None if it is left out.

        The documents must be those of `Signatures.add_unit`, in the same order.
        """
        pieces = _pieces(text, self._mode)
        count = 1 if self._mode == "documents" else max(0, len(pieces) - SPAN + 1)
        flags = self._flags[self._used : self._used + count]
        self._used += count
        assert len(flags) == count, "other documents than those whose signatures were taken"
        if not flags.any():
            return text
        if self._mode == "documents":
            self.counters["duplicate_documents"] += 1
            return None
        taken_out = np.convolve(flags, np.ones(SPAN, dtype=np.int64)) > 0
        left = "".join(piece for piece, out in zip(pieces, taken_out, strict=True) if not out).lstrip()
        self.counters[f"duplicate_{self._mode}"] += int(taken_out.sum())
        if len(_WORD.findall(left)) <= FEWEST_WORDS:
            self.counters["duplicate_documents"] += 1
            return None
        self.counters["duplicates_changed"] += 1
        return left


def _signatures(text: str, mode: Mode) -> list[bytes]:
    if mode == "documents":
        return [_digest(text)]
    normal = [_normal_form(piece) for piece in _pieces(text, mode)]
    spans = (" ".join(filter(None, normal[first : first + SPAN])) for first in range(len(normal) - SPAN + 1))
    return [_digest(span) if span else _NOTHING for span in spans]


def _pieces(text: str, mode: Mode) -> list[str]:
    """Cut a text into lines or sentences, each with the blanks that follow it; together they are the text."""
    if mode == "documents":
        return [text]
    ends = [0, *(match.end() for match in _ENDS[mode].finditer(text))]
    if ends[-1] < len(text):
        ends.append(len(text))
    return [text[start:end] for start, end in pairwise(ends)]


def _normal_form(text: str) -> str:
    text = text.lower()
    if not text.isascii():
        text = _ACCENT.sub("", unicodedata.normalize("NFD", text))
    return _NUMBER.sub("0", " ".join(_WORD.findall(text)))


def _digest(text: str) -> bytes:
    # Half of a surrogate pair, which the reader of a document may have let through, has a signature too.
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).digest()


def _repeated(digests: npt.NDArray[np.uint64], places: npt.NDArray[np.uint64], world: World) -> Flags:
    """Say which of this rank's signatures, shape (n, 2), have an equal one at an earlier place on any rank."""
    repeated = _later_ones(digests, places)
    first = np.flatnonzero(~repeated)
    rounds = max(1, -(-max(world.allgather(len(first))) // _PER_ROUND))
    owners = digests[first, 0] % np.uint64(rounds * world.size)
    for number in range(rounds):
        sent = [first[owners == number * world.size + rank] for rank in range(world.size)]
        received = world.exchange([(digests[chosen], places[chosen]) for chosen in sent])
        flags = _later_ones(
            np.concatenate([of_rank for of_rank, _ in received]), np.concatenate([of_rank for _, of_rank in received])
        )
        bounds = np.cumsum([len(of_rank) for _, of_rank in received])[:-1]
        for chosen, of_rank in zip(sent, world.exchange(np.split(flags, bounds)), strict=True):
            repeated[chosen] = of_rank
    return repeated & digests.any(axis=1)


def _later_ones(digests: npt.NDArray[np.uint64], places: npt.NDArray[np.uint64]) -> Flags:
    """Say which of `digests` are equal to one with a lower place."""
    order = np.lexsort((places, digests[:, 1], digests[:, 0]))
    in_order = digests[order]
    flags = np.zeros(len(digests), np.bool_)
    flags[order[1:]] = (in_order[1:] == in_order[:-1]).all(axis=1)
    return flags
