"""The fastest encoder at hand that gives the ids of `tokenizers`, which stays the judge: no id is traded for speed.

Two encoders are known to give identical ids, about 60 and 30 times faster: gigatoken (only for tokenizers with one of
the well-known split patterns) and fastokens. Both are optional. One is used after it has proved itself on a sample of
the user's corpus and on texts that are known to part encoders; and while it works, a thousandth of the documents is
encoded by `tokenizers` too.

The fast encoders get a copy of tokenizer.json without its special tokens: they would let the letters of one in a
document become the token.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from data_prep.errors import DataError
from data_prep.tokenizer import Tokenizer, refuse_surrogates, use_threads
from data_prep.world import World

Ids = npt.NDArray[np.uint32]
Encode = Callable[[list[str]], list[Ids]]

REFERENCE = "tokenizers"
DOCUMENTS_PER_CHECK = 1000  # one document of so many is encoded twice
_CHECKED_CHARACTERS = 2**16  # of a document, at most: `tokenizers` takes a second for 2 MB
_SAMPLE_CHARACTERS = 2**18
_EXCERPT = 60  # characters of a text in a message
_MEMORY_GROWTH = 2**30  # bytes of the process
_CHARACTERS_PER_LOOK = 2**27  # a second of work: it takes a third of one to make an encoder


class Engine:
    """Encodes documents, as data, with the ids of `tokenizers`.

    Attributes:
        name: the encoder at work.
        note: why a faster one is not, for the user; None if there is no faster one.
    """

    def __init__(self, name: str, encode: Encode, reference: Tokenizer, note: str | None = None) -> None:
        """Wrap an encoder that has proved itself; see `choose_engine`."""
        self.name, self.note = name, note
        self._encode, self._reference = encode, reference
        self._documents = 0

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, shape (tokens,), without begin or end; no text yields a special token.

        Raises:
            DataError: a text is not Unicode, or a text that was encoded twice has got different ids.
        """
        texts = list(texts)
        try:
            encoded = self._encode(texts)
        except (TypeError, UnicodeEncodeError):
            refuse_surrogates(texts)
            raise
        first = -self._documents % DOCUMENTS_PER_CHECK
        self._documents += len(texts)
        if self.name != REFERENCE:
            self._check(texts[first::DOCUMENTS_PER_CHECK], encoded[first::DOCUMENTS_PER_CHECK])
        return encoded

    def _check(self, texts: Sequence[str], encoded: Sequence[Ids]) -> None:
        for text, ids in zip(texts, encoded, strict=True):
            if len(text) > _CHECKED_CHARACTERS:
                start = (len(text) - _CHECKED_CHARACTERS) // 2
                text = text[start : start + _CHECKED_CHARACTERS]  # noqa: PLW2901 - the rest is not looked at
                (ids,) = self._encode([text])  # noqa: PLW2901
            if not np.array_equal(ids, self._reference.encode_batch([text])[0]):
                raise DataError(
                    f"{self.name}: gives other ids than {REFERENCE} for the text {_where_they_part(self, text)}; build"
                    f" again with engine: {REFERENCE}, and tell the authors of {self.name}"
                )

    def parts_from_reference(self, text: str) -> bool:
        """Say whether the ids of `text` differ from those of `tokenizers`."""
        return not np.array_equal(self._encode([text])[0], self._reference.encode_batch([text])[0])


def choose_engine(tokenizer_dir: Path, sample: Sequence[str], prefer: str = "auto", *, threads: bool = False) -> Engine:
    """Return the fastest encoder that is installed and gives identical ids.

    Args:
        tokenizer_dir: directory of a tokenizer.json.
        sample: texts of the corpus; the first 64 Ki characters of each are looked at, 256 Ki in all.
        prefer: "auto", or the name of one encoder.
        threads: whether one process may use several cores.

    Raises:
        DataError: no usable tokenizer, or `prefer` names an encoder that does not exist or is not installed.
    """
    use_threads(threads)
    reference = Tokenizer.load(tokenizer_dir)
    if prefer not in ("auto", REFERENCE, *_FAST):
        raise DataError(f"engine: {prefer!r} is none of auto, {', '.join(_FAST)}, {REFERENCE}")
    notes = []
    texts = [*_cut(sample), *reference.special_tokens, *difficult_texts()]
    for name, make in _FAST.items():
        if prefer not in ("auto", name):
            continue
        if find_spec(name) is None:
            if prefer == name:
                raise DataError(f"engine: {name} is not installed; `pip install {name}`, or choose auto")
            notes.append(f"{name} is not installed")
            continue
        engine, problem = _proven(name, make, reference, texts, threads)
        if engine is not None:
            engine.note = "; ".join(notes) or None
            return engine
        notes.append(problem)
    return Engine(REFERENCE, reference.encode_batch, reference, "; ".join(notes) or None)


def agree_on_engine(tokenizer_dir: Path, sample: Sequence[str], prefer: str, world: World) -> Engine:
    """Return the fastest encoder that is right about the samples of all ranks, the same on each; a collective.

    Rank 0 warns if it is not the fastest one there is, and says why.

    Args:
        tokenizer_dir: see `choose_engine`.
        sample: texts of the corpus, others on every rank.
        prefer: see `choose_engine`.
        world: the ranks.

    Raises:
        DataError: see `choose_engine`; on every rank.
    """
    order = [*_FAST, REFERENCE]
    notes: list[str] = []
    while True:
        with world.guard("choose an encoder"):
            engine = choose_engine(tokenizer_dir, sample, prefer, threads=world.size == 1)  # ranks share the cores
        verdicts = world.allgather((order.index(engine.name), engine.note))
        notes += [note for _, note in verdicts if note is not None]
        slowest = max(place for place, _ in verdicts)
        if slowest == min(place for place, _ in verdicts):
            break
        prefer = order[slowest]
    if notes and world.rank == 0:
        warnings.warn(f"tokenizing is slower than it could be: {notes[0]}", stacklevel=3)
    return engine


def _proven(
    name: str, make: Callable[[str, bool], Encode], reference: Tokenizer, texts: Sequence[str], threads: bool
) -> tuple[Engine | None, str]:
    """Return an engine if the encoder gives identical ids for `texts`, and what is wrong with it if not."""
    at = "its definition"
    try:
        engine = Engine(name, make(_without_special_tokens(reference), threads), reference)
        for text in texts:
            at = f"the text {_excerpt(text)}"
            if engine.parts_from_reference(text):
                return None, f"{name} gives other ids for the text {_where_they_part(engine, text)}"
    except BaseException as error:  # whatever it raises, it cannot encode; a panic of Rust is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return None, f"{name} cannot use this tokenizer, at {at} ({error})"
    return engine, ""


def _where_they_part(engine: Engine, text: str) -> str:
    """Return a short stretch of `text` that is encoded differently, quoted."""
    while len(text) > _EXCERPT:
        half, quarter = len(text) // 2, len(text) // 4
        # The third piece is for a difference that lies across the middle.
        pieces = (text[:half], text[half:], text[quarter : quarter + half])
        shorter = next((piece for piece in pieces if engine.parts_from_reference(piece)), None)
        if shorter is None:
            break
        text = shorter
    return _excerpt(text)


def _excerpt(text: str) -> str:
    return ascii(text if len(text) <= _EXCERPT else text[:_EXCERPT] + "...")


def _cut(sample: Sequence[str]) -> Iterator[str]:
    left = _SAMPLE_CHARACTERS
    for text in sample:
        # Half of a surrogate pair is for whoever encodes the document to refuse.
        taken = text[: min(left, _CHECKED_CHARACTERS)].encode(errors="replace").decode()
        left -= len(taken)
        if not taken and text:
            return
        yield taken


def difficult_texts() -> list[str]:
    """Return texts on which encoders have been seen to part, or might."""
    low, high = (
        range(0x3100),
        chain(range(0x3100, 0xD800, 16), range(0xE000, 0x1_0000, 16), range(0x1_0000, 0x2_0000, 16)),
    )
    # Tables of letters and digits differ between versions of Unicode: every character that is common, some of the rest.
    characters = [chr(code) for code in chain(low, high, range(0x1_F300, 0x1_FB00))]
    return [
        "",
        "nul \x00 in text\x00",
        "line\r\nline\r\n\r\n\rline\n\n\n  line\n \n\t\n",
        "no\u00a0break \u00a0before\u00a0 a word \u3000wide\u2028 \u0085next\ufeff",
        "e\u0301 combi\u0308ning a\u0300\u0301\u0302 \u0e01\u0e33\u0e49 \u0915\u094d\u0937",
        "\U0001f469\u200d\U0001f4bb \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd \u2764\ufe0f",
        "we'll WE'LL it\u2019s 'S 'Ve '\u017f I'M 'd'D \u212a\u0130\u0131",
        "1234567890 \u0663\u0664\u0665\u0666 \u00b2\u00bd\u2167 3.14e-10 0x7fff 1,000,000",
        "snake_case camelCase <tag attr='x'/> #!/bin/sh ${VAR} \\n\\t //--==>>",
        "\u4e2d\u6587\u6ca1\u6709\u7a7a\u683c\u3002\u65e5\u672c\u8a9e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4",
        "<|endoftext|> <s> </s> <pad> [INST] <|im_start|>",
        " " * 100_000,
        "\n" * 10_000,
        "x" * 20_000,
        "-=" * 10_000,
        "7" * 10_000,
        "".join(f"{character}a " for character in characters),
        "".join(f"x{character}" for character in characters),
        "".join(f"\n{character}\n" for character in islice(characters, 0, None, 4)),
    ]


def _without_special_tokens(tokenizer: Tokenizer) -> str:
    """Return the tokenizer.json of `tokenizer` as fast encoders are to see it: text in, tokens of text out."""
    record = json.loads(tokenizer.definition)
    record["added_tokens"] = [token for token in record.get("added_tokens") or [] if not token["special"]]
    record |= {"post_processor": None, "truncation": None, "padding": None}
    return json.dumps(record, ensure_ascii=False)


def _gigatoken(definition: str, threads: bool) -> Encode:
    from gigatoken import Tokenizer as Gigatoken

    def make() -> Encode:
        model = Gigatoken.from_json(definition)

        def encode(texts: list[str]) -> list[Ids]:
            layout: Any = model.encode_batch(texts, parallel=threads).layout
            return _split(layout.content.data, layout.offsets.data)

        return encode

    return _Renewed(make)


class _Renewed:
    """An encoder that is made anew when its memory has grown: gigatoken remembers every word that it has seen.

    Measured: 60 MB for 600 MB of sources and manuals, but 8 bytes a byte of text in which no word comes twice.
    """

    def __init__(self, make: Callable[[], Encode]) -> None:
        self._make = make
        self._process = psutil.Process()
        self._memory = self._characters = 0
        self._begin()

    def __call__(self, texts: list[str]) -> list[Ids]:
        if self._characters > _CHARACTERS_PER_LOOK:
            if self._process.memory_info().rss > self._memory + _MEMORY_GROWTH:
                self._begin()
            self._characters = 0
        self._characters += sum(map(len, texts))
        return self._encode(texts)

    def _begin(self) -> None:
        self._encode, self._characters = self._make(), 0
        self._memory = self._process.memory_info().rss


def _fastokens(definition: str, threads: bool) -> Encode:
    from fastokens import Tokenizer as Fastokens

    model = Fastokens.from_json_str(definition)  # its threads: see `use_threads`

    def encode(texts: list[str]) -> list[Ids]:
        ids, offsets = model.encode_batch_flat(texts)
        return _split(np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64))

    return encode


def _split(flat: Ids, offsets: npt.NDArray[np.integer]) -> list[Ids]:
    bounds = offsets.tolist()
    return [flat[start:stop] for start, stop in pairwise(bounds)]


_FAST: dict[str, Callable[[str, bool], Encode]] = {"gigatoken": _gigatoken, "fastokens": _fastokens}
