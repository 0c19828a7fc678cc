"""What is done to documents between reading and encoding, and which are left out: each step optional and counted."""

from __future__ import annotations

import importlib
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.dedup import MODES, Mode
from data_prep.errors import DataError

Ids = npt.NDArray[np.unsignedinteger]

LONGEST_NGRAM = 13  # tokens
REPEATS = 32


@dataclass(frozen=True)
class FilterConfig:
    """Which filters a build applies, in this order; none by default.

    Attributes:
        normalize_nfc: compose characters (Unicode NFC).
        user: functions "module:function" of a text that return the text to use instead, or None to leave it out;
            modules are looked for in the working directory too. Of a chat they get the content of each turn, and None
            for one leaves out the chat.
        min_chars, max_chars: shorter and longer documents are left out; of a chat, all turns together count.
        deduplicate: "documents" leaves out a document whose text came before; "lines" and "sentences" take out spans
            of three that came before. See `data_prep.dedup`.
        repeated_ngrams: leaves out documents in which 1 to 13 tokens come 32 times in a row or more. Such documents
            give spikes of the loss (OLMo 2, arXiv:2501.00656, section 3.1).
    """

    normalize_nfc: bool = False
    user: tuple[str, ...] = ()
    min_chars: int = 0
    max_chars: int | None = None
    deduplicate: Mode = "none"
    repeated_ngrams: bool = False

    def __post_init__(self) -> None:
        if self.deduplicate not in MODES:
            raise DataError(f"deduplicate: {self.deduplicate!r} is none of {', '.join(MODES)}")
        if self.min_chars < 0 or (self.max_chars is not None and self.max_chars < self.min_chars):
            raise DataError(f"min_chars: {self.min_chars} to max_chars: {self.max_chars} lets no document pass")


class Filters:
    """The filters that look at one document at a time.

    Attributes:
        counters: how many documents each filter has changed (`..._changed`) or left out, by name; none of zero.
    """

    def __init__(self, config: FilterConfig) -> None:
        """Import the user's functions.

        Raises:
            DataError: one of them cannot be imported.
        """
        self._config = config
        self._user = [(name, load_function(name)) for name in config.user]
        self.counters: Counter[str] = Counter()

    def apply(self, text: str) -> str | None:
        """Return the text to go on with, or None if the document is left out.

        Raises:
            DataError: a user's function failed or returned something else than text or None.
        """
        if self._config.normalize_nfc:
            text = self._normalized(text)
        for name, function in self._user:
            result = _call(name, function, text)
            if result is None:
                self.counters[f"user {name}"] += 1
                return None
            self.counters[f"user {name}_changed"] += result != text
            text = result
        return text if self._has_good_length(len(text)) else None

    def apply_to_turns(self, turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """Return the turns of a chat to go on with, or None if it is left out."""
        result = [dict(turn) for turn in turns]
        spoken = [turn for turn in result if isinstance(turn.get("content"), str)]
        if self._config.normalize_nfc:
            texts = [turn["content"] for turn in spoken]
            for turn in spoken:
                turn["content"] = unicodedata.normalize("NFC", turn["content"])
            self.counters["nfc_changed"] += texts != [turn["content"] for turn in spoken]
        for name, function in self._user:
            texts = [turn["content"] for turn in spoken]
            changed = [_call(name, function, text) for text in texts]
            if None in changed:
                self.counters[f"user {name}"] += 1
                return None
            self.counters[f"user {name}_changed"] += changed != texts
            for turn, text in zip(spoken, changed, strict=True):
                turn["content"] = text
        return result if self._has_good_length(sum(len(turn["content"]) for turn in spoken)) else None

    def keep(self, documents: Sequence[Ids]) -> list[bool]:
        """Say which documents, given by their ids without control tokens, pass the filters of tokens."""
        if not self._config.repeated_ngrams:
            return [True] * len(documents)
        repeats = have_repeated_ngrams(documents)
        self.counters["repeated_ngrams"] += sum(repeats)
        return [not found for found in repeats]

    def _normalized(self, text: str) -> str:
        if unicodedata.is_normalized("NFC", text):
            return text
        self.counters["nfc_changed"] += 1
        return unicodedata.normalize("NFC", text)

    def _has_good_length(self, length: int) -> bool:
        if length < self._config.min_chars:
            self.counters["too_short"] += 1
            return False
        if self._config.max_chars is not None and length > self._config.max_chars:
            self.counters["too_long"] += 1
            return False
        return True


def load_function(name: str) -> Callable[[str], object]:
    """Import "module:function", looking in the working directory too.

    Raises:
        DataError: there is no such function, or its module fails to import.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise DataError(f"user filter {name!r}: write it as module:function")
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        function: Callable[[str], object] | None = getattr(importlib.import_module(module_name), function_name, None)
    except Exception as error:  # whatever the user's module raises
        raise DataError(f"user filter {name}: cannot be imported ({error!r}); looked in {here} too") from error
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise DataError(f"user filter {name}: {module_name} has no function {function_name}")
    return function


def _call(name: str, function: Callable[[str], object], text: str) -> str | None:
    try:
        result = function(text)
    except Exception as error:  # whatever the user's function raises
        raise DataError(f"user filter {name}: failed ({error!r}) on the text {text[:60]!a}; mend it") from error
    if result is not None and not isinstance(result, str):
        raise DataError(f"user filter {name}: returned {type(result).__name__}; it must return a text or None")
    return result


def have_repeated_ngrams(documents: Sequence[Ids]) -> list[bool]:
    """Say for each document whether 1 to `LONGEST_NGRAM` tokens come `REPEATS` times in a row or more in it.

    An n-gram that is repeated r times is a stretch of (r - 1) n tokens that equal the token n places on. Such a
    stretch holds every (r - 1) n-th position at least once, so that only those are looked at in all documents, and the
    surroundings of the few that match.
    """
    ends = np.cumsum([len(ids) for ids in documents])
    found = [False] * len(documents)
    flat: Ids = np.concatenate([np.empty(0, np.uint32), *documents])
    for length in range(1, LONGEST_NGRAM + 1):
        needed = (REPEATS - 1) * length
        for place in _likely_places(flat, length, needed).tolist():
            document = int(np.searchsorted(ends, place, side="right"))
            if not found[document]:
                first, end = int(ends[document]) - len(documents[document]), int(ends[document])
                # The stretch around `place` needs to be followed no further than the length that it needs.
                low, high = max(first, place - needed + 1), min(end - length, place + needed)
                found[document] = _longest_run(flat[low:high] == flat[low + length : high + length]) >= needed
    return found


def _likely_places(flat: Ids, length: int, needed: int) -> npt.NDArray[np.int64]:
    """Return the multiples of `needed` that may lie in a stretch of `needed` tokens equal to those `length` on."""
    last = len(flat) - length - 1
    places: npt.NDArray[np.int64] = np.arange(0, last + 1, needed)
    places = places[flat[places] == flat[places + length]]
    # A stretch reaches from any place in it over half of its length, forwards or backwards.
    likely = np.zeros(len(places), np.bool_)
    for quarter in (needed // 4, -(needed // 4)):
        near, far = (np.clip(places + steps * quarter, 0, last) for steps in (1, 2))
        likely |= (flat[near] == flat[near + length]) & (flat[far] == flat[far + length])
    kept: npt.NDArray[np.int64] = places[likely]
    return kept


def _longest_run(flags: npt.NDArray[np.bool_]) -> int:
    """Return the length of the longest run of True."""
    breaks = np.flatnonzero(~flags)
    return int(np.diff(np.concatenate([[-1], breaks, [len(flags)]])).max()) - 1
