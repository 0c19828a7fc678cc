"""Byte-level BPE: training one, saving it in the layout of Hugging Face, and encoding text as data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from data_prep.errors import DataError
from data_prep.files import published_directory

BEGIN, END, PAD = "<|begin_text|>", "<|end_text|>", "<|pad|>"
SPECIAL_TOKENS = (BEGIN, END, PAD)

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

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_NO_LIMIT = 10**30  # Hugging Face's mark for "this tokenizer does not limit the length"


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens, the 256 bytes and `SPECIAL_TOKENS` among them.

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
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(documents, trainer)
    reached = model.get_vocab_size()
    if reached < vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size}: the corpus has only enough distinct text for {reached} tokens; add text or"
            f" ask for at most {reached}"
        )
    return model


def save_tokenizer(model: tokenizers.Tokenizer, out: Path) -> None:
    """Write `out`/tokenizer.json and `out`/tokenizer_config.json (Hugging Face names); `out` appears whole or not.

    Raises:
        DataError: `out` exists.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_LIMIT,
    }
    with published_directory(out) as partial:
        (partial / TOKENIZER_FILE).write_text(model.to_str(pretty=True), encoding="utf-8")
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Tokenizer:
    """A tokenizer as the pipeline uses it: text is data, control tokens come from their ids alone.

    Attributes:
        vocab_size: one more than the largest id; a foreign tokenizer may leave ids out.
        begin_id, end_id, pad_id: ids of `SPECIAL_TOKENS`, looked up by name.
        sha256: hex digest of the bytes of tokenizer.json; the identity that datasets and checkpoints record.
    """

    def __init__(self, definition: bytes, named: str) -> None:
        """Make a tokenizer from the content of a tokenizer.json; `named` is what error messages call it."""
        try:
            self._model = tokenizers.Tokenizer.from_str(definition.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise DataError(
                f"{named}: not a tokenizer ({error}); make one with `rookery data train-tokenizer`"
            ) from error
        self.sha256 = hashlib.sha256(definition).hexdigest()
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
        found = {name: self._model.token_to_id(name) for name in SPECIAL_TOKENS}
        ids = {name: token_id for name, token_id in found.items() if token_id is not None}
        missing = [name for name in SPECIAL_TOKENS if name not in ids]
        if missing:
            raise DataError(
                f"{named}: no token named {', '.join(missing)}; add it as a special token, or make a tokenizer with"
                " `rookery data train-tokenizer`"
            )
        self.begin_id, self.end_id, self.pad_id = ids[BEGIN], ids[END], ids[PAD]
        self._model.encode_special_tokens = True
        self._refuse_control_tokens_in_text(named)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Load `directory`/tokenizer.json.

        Raises:
            DataError: no such file, not a tokenizer, a special token is missing or could come out of plain text.
        """
        path = directory / TOKENIZER_FILE
        try:
            definition = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: cannot read the tokenizer ({error.strerror}); make one with `rookery data train-tokenizer"
                f" --out {directory}`"
            ) from error
        return cls(definition, str(path))

    def _refuse_control_tokens_in_text(self, named: str) -> None:
        for name, ids in zip(SPECIAL_TOKENS, self.encode_batch(SPECIAL_TOKENS), strict=True):
            if np.isin(ids, (self.begin_id, self.end_id, self.pad_id)).any():
                raise DataError(
                    f'{named}: the text {name} in a document would become the control token; give it "special": true'
                    " in added_tokens"
                )

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of `SPECIAL_TOKENS` by name."""
        return {BEGIN: self.begin_id, END: self.end_id, PAD: self.pad_id}

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Return the ids of each text, shape (tokens,), without begin or end; no text yields a control token."""
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Return the text of `ids`, control tokens by their names; bytes that are no UTF-8 become U+FFFD."""
        return self._model.decode([int(token_id) for token_id in ids], skip_special_tokens=False)


def use_threads(allowed: bool) -> None:
    """Let the encoder use every core, or one only, unless the user has set TOKENIZERS_PARALLELISM."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if allowed else "false")
