"""Byte-level BPE: training one, taking in one of Hugging Face, and encoding text as data."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from data_prep.errors import DataError
from data_prep.files import published_directory

# The special tokens of the reference (its layout "complete"), in its order: they are the last ids of a vocabulary.
SPECIAL_TOKENS = (
    *("<|begin_text|>", "<|end_text|>", "<|begin_header|>", "<|end_header|>", "<|end_turn|>", "<|pad|>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|...|>", "<|del|>"),
    *(f"<|c_{number}|>" for number in range(10)),
    *("<|?|>", "<|&|>", "<|!|>", "<|-|>", "<|+|>", "<|interrupt|>", "<|>>-|>", "<|-<<|>", "<|->>|>", "<|<<-|>"),
    *("<|tool_out|>", "<|end_tool|>", "<|tool_in|>", "<|end_tool_in|>"),
)

# The reference's chat format: every turn has a header that names its role ("Huginn" for the assistant) and ends with a
# token of its own; what the assistant says, that token included, is what a model learns (`generation`).
CHAT_TEMPLATE = "".join(
    (
        "{% for message in messages %}",
        "{% set is_answer = message['role'] in ['assistant', 'Huginn'] %}",
        "{% set turn = (message['content'] | trim) + '<|end_turn|>' %}",
        "{{ bos_token if loop.first else '' }}",
        r"{{ '<|begin_header|>' + ('Huginn' if is_answer else message['role']) + '<|end_header|>\n\n' }}",
        "{% if is_answer %}{% generation %}{{ turn }}{% endgeneration %}{% else %}{{ turn }}{% endif %}",
        "{% endfor %}",
        r"{{ '<|begin_header|>Huginn<|end_header|>\n\n' if add_generation_prompt else '<|end_text|>' }}",
    )
)

# The split pattern known as cl100k, in the spelling that Hugging Face tokenizer files use for it: contractions, a word
# with one leading character, up to three digits, punctuation with its line ends, line ends, trailing blanks, blanks.
# Faster encoders recognise a tokenizer by this very string, so it must not be reworded.
SPLIT_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
_LONGEST_TOKEN = 32  # characters, as in the reference: no token for a line of dashes

TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_NO_LIMIT = 10**30  # Hugging Face's mark for "this tokenizer does not limit the length"


@dataclass(frozen=True)
class ControlTokens:
    """Names of the three tokens that the pipeline puts in by itself; three different ones.

    Attributes:
        begin, end: stand before and after every document.
        pad: fills rows up; it is never a target.
    """

    begin: str = "<|begin_text|>"
    end: str = "<|end_text|>"
    pad: str = "<|pad|>"


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens, the 256 bytes and `SPECIAL_TOKENS` (last) among them.

    The result depends on the documents alone, not on their order, the machine or the number of threads.

    Raises:
        DataError: `vocab_size` is too small to hold every byte, or larger than this corpus can fill.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"--vocab-size {vocab_size}: a byte-level vocabulary needs 256 bytes and {len(SPECIAL_TOKENS)} special"
            f" tokens; ask for at least {SMALLEST_VOCABULARY}"
        )
    model = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=_LONGEST_TOKEN,
        show_progress=False,
    )
    model.train_from_iterator(documents, trainer)
    model.add_special_tokens(list(SPECIAL_TOKENS))
    reached = model.get_vocab_size()
    if reached < vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size}: the corpus has only enough distinct text for {reached} tokens; add text or"
            f" ask for at most {reached}"
        )
    return model


def adopt_tokenizer(source: Path, control: ControlTokens, out: Path) -> Tokenizer:
    """Save the Hugging Face tokenizer of the directory `source` as `out`, with the control tokens `control`.

    Those of them that it lacks become special tokens with the next free ids; all other ids stay, and so does its chat
    template, if it has one.

    Raises:
        DataError: not a tokenizer, or one that stays unfit for the pipeline; `out` exists.
    """
    path = source / TOKENIZER_FILE
    model = _parse(_read(path), str(path))
    # A name that is there already keeps its id and only becomes special.
    model.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in astuple(control)])
    tokenizer = Tokenizer(model.to_str(pretty=True).encode(), str(path), control)
    save_tokenizer(model, out, control, load_chat_template(source))
    return tokenizer


def save_tokenizer(
    model: tokenizers.Tokenizer,
    out: Path,
    control: ControlTokens = ControlTokens(),
    chat_template: str | None = CHAT_TEMPLATE,
) -> None:
    """Write `out`/tokenizer.json and `out`/tokenizer_config.json (Hugging Face names); `out` appears whole or not.

    Raises:
        DataError: `out` exists.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": control.begin,
        "eos_token": control.end,
        "pad_token": control.pad,
        **({} if chat_template is None else {"chat_template": chat_template}),
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_LIMIT,
    }
    with published_directory(out) as partial:
        (partial / TOKENIZER_FILE).write_text(model.to_str(pretty=True), encoding="utf-8")
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Tokenizer:
    """A tokenizer as the pipeline uses it: text is data, control tokens come from their ids alone.

    Attributes:
        control: names of the control tokens.
        begin_id, end_id, pad_id: their ids, looked up by name.
        special_tokens: ids of all special tokens by name; no text ever yields one of them.
        vocab_size: number of tokens, the special ones included; every id is below it.
        definition: content of tokenizer.json.
        sha256: hex digest of `definition`; the identity that datasets and checkpoints record.
    """

    def __init__(self, definition: bytes, named: str, control: ControlTokens = ControlTokens()) -> None:
        """Make a tokenizer from the content of a tokenizer.json; `named` is what error messages call it."""
        self._model = _parse(definition, named)
        self._model.no_truncation()  # files often carry a length limit, which would cut documents without a word
        self._model.no_padding()
        self._model.encode_special_tokens = True
        self.definition, self.sha256 = definition, hashlib.sha256(definition).hexdigest()
        self.vocab_size: int = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
        self.special_tokens = _special_tokens(definition, named)
        self.control = control
        names = astuple(control)
        missing = [name for name in names if name not in self.special_tokens]
        if missing:
            raise DataError(
                f"{named}: no special token named {', '.join(missing)}; add them with `rookery data adopt-tokenizer`,"
                f" or set bos_token, eos_token and pad_token in {CONFIG_FILE} beside it to special tokens that it has"
            )
        if len(set(names)) < len(names):
            raise DataError(
                f"{named}: begin, end and pad are {', '.join(names)}, but they must be three different tokens; name"
                " others with `rookery data adopt-tokenizer`, or as bos_token, eos_token and pad_token in"
                f" {CONFIG_FILE} beside it"
            )
        self.begin_id, self.end_id, self.pad_id = (self.special_tokens[name] for name in names)
        self._refuse_special_tokens_in_text(named)

    @classmethod
    def load(cls, directory: Path, control: ControlTokens | None = None) -> Tokenizer:
        """Load `directory`/tokenizer.json.

        Args:
            directory: any Hugging Face tokenizer directory.
            control: names of the control tokens; as tokenizer_config.json there has them if None (bos, eos, pad).

        Raises:
            DataError: no such file, not a tokenizer, a control token is missing, special tokens are ambiguous or
                could come out of plain text.
        """
        path = directory / TOKENIZER_FILE
        return cls(_read(path), str(path), control or configured_tokens(directory))

    def _refuse_special_tokens_in_text(self, named: str) -> None:
        special_ids = list(self.special_tokens.values())
        for name, ids in zip(self.special_tokens, self.encode_batch(list(self.special_tokens)), strict=True):
            if np.isin(ids, special_ids).any():
                raise DataError(
                    f'{named}: the text {name} in a document would become the control token; give it "special": true'
                    " in added_tokens"
                )

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of the control tokens by name: begin, end, pad, in this order."""
        return dict(zip(astuple(self.control), (self.begin_id, self.end_id, self.pad_id), strict=True))

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Return the ids of each text, shape (tokens,), without begin or end; no text yields a special token.

        Raises:
            DataError: a text is not Unicode (it holds a lone surrogate).
        """
        try:
            encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            refuse_surrogates(texts)
            raise
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def encode_with_spans(self, text: str) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Return the ids of `text` and, shape (tokens, 2), from where to where in `text` each reaches, characters."""
        try:
            encoding = self._model.encode(text, add_special_tokens=False)
        except TypeError:
            refuse_surrogates([text])
            raise
        return np.array(encoding.ids, np.uint32), np.array(encoding.offsets, np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Return the text of `ids`, special tokens by their names; bytes that are no UTF-8 become U+FFFD."""
        return self._model.decode([int(token_id) for token_id in ids], skip_special_tokens=False)


def token_ids(directory: Path) -> dict[str, int]:
    """Return the ids of all tokens of `directory`/tokenizer.json by name, special ones included.

    Raises:
        DataError: no such file, or not a tokenizer.
    """
    path = directory / TOKENIZER_FILE
    return _parse(_read(path), str(path)).get_vocab(with_added_tokens=True)


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Raise a DataError if one of `texts` holds half of a surrogate pair, which is no Unicode text.

    JSON can smuggle one in (a lone backslash-u-D800).
    """
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = text[max(0, error.start - 20) : error.start + 20]
            raise DataError(
                f"document {number} of a batch: character {error.start} is half of a surrogate pair, in"
                f" {around!a}; mend the text or set on_bad_document: skip"
            ) from error


def use_threads(allowed: bool) -> None:
    """Let the encoder use every core, or one only, unless the user has set TOKENIZERS_PARALLELISM."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if allowed else "false")


def load_config(directory: Path) -> dict[str, Any]:
    """Return `directory`/tokenizer_config.json, or nothing if there is no such file.

    Raises:
        DataError: it is not a JSON object.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it from the tokenizer's source") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: is no JSON object; restore it from the tokenizer's source")
    return config


def load_chat_template(directory: Path) -> str | None:
    """Return the chat template of a tokenizer, from where Hugging Face puts it; None if it has none.

    Raises:
        DataError: it cannot be read.
    """
    path = directory / TEMPLATE_FILE
    if path.is_file():
        return _read(path).decode("utf-8", errors="replace")
    template = load_config(directory).get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def configured_tokens(directory: Path) -> ControlTokens:
    """Return the control tokens that `directory`/tokenizer_config.json names, the reference's where it names none."""
    config = load_config(directory)
    names = {}
    for role, key in (("begin", "bos_token"), ("end", "eos_token"), ("pad", "pad_token")):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[role] = value
    return ControlTokens(**names)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the tokenizer ({error.strerror}); make one with `rookery data train-tokenizer"
            f" --out {path.parent}`"
        ) from error


def _parse(definition: bytes, named: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(definition.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception for every kind of bad file
        raise DataError(f"{named}: not a tokenizer ({error}); make one with `rookery data train-tokenizer`") from error


def _special_tokens(definition: bytes, named: str) -> dict[str, int]:
    """Return the special tokens of a tokenizer.json by name; the library takes ambiguous ones without a word."""
    record = json.loads(definition)
    added = record.get("added_tokens") or []
    vocabulary = record["model"].get("vocab")
    by_name = vocabulary if isinstance(vocabulary, dict) else {}
    for key in ("content", "id"):
        twice = [str(value) for value, count in Counter(token[key] for token in added).items() if count > 1]
        if twice:
            raise DataError(f"{named}: added_tokens has {key} {', '.join(twice)} more than once; keep one of each")
    for token in added:
        other = by_name.get(token["content"], token["id"])
        if other != token["id"]:
            raise DataError(
                f"{named}: {token['content']} has id {token['id']} in added_tokens but {other} in the vocabulary; keep"
                " one of them"
            )
    return {token["content"]: token["id"] for token in added if token["special"]}
