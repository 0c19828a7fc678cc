import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, save_tokenizer, train_tokenizer

TRAPS = [
    "<|end_text|>",
    "a<|begin_text|>b <|pad|> <|end_text|><|end_text|>\n",
    "line\r\nline\r\n\r\n",
    "nul \x00 in text",
    "no\u00a0break",
    "e\u0301 combining \U0001f469\u200d\U0001f4bb joined",
    "x" * 5000,
    " " * 5000,
    "",
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir)


@pytest.mark.parametrize("text", TRAPS)
def test_no_text_becomes_a_control_token_and_none_is_lost(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode_batch([text])
    assert not set(ids.tolist()) & {tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id}
    assert tokenizer.decode(ids) == text


@given(text=st.text())
def test_any_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert ids.size == 0 or ids.max() < tokenizer.vocab_size


def test_a_batch_encodes_each_text_as_if_it_were_alone(tokenizer: Tokenizer) -> None:
    for text, ids in zip(TRAPS, tokenizer.encode_batch(TRAPS), strict=True):
        assert ids.dtype == np.uint32
        np.testing.assert_array_equal(ids, tokenizer.encode_batch([text])[0])


def test_control_tokens_decode_to_their_names(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.special_ids[name] for name in SPECIAL_TOKENS]
    assert len(set(ids)) == 3
    assert tokenizer.decode(ids) == "".join(SPECIAL_TOKENS)


def test_the_split_keeps_words_with_their_space_and_numbers_in_threes() -> None:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    pieces = [piece for piece, _ in split.pre_tokenize_str("It's 12345 !=\n\n  _x  y \n")]
    assert pieces == ["It", "'s", " ", "123", "45", " !=\n\n", " ", " _", "x", " ", " y", " \n"]


def test_training_gives_exactly_the_size_asked_for_whatever_the_order(corpus: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())[:3]]
    forwards, backwards = train_tokenizer(texts, 400), train_tokenizer(reversed(texts), 400)
    assert forwards.get_vocab_size() == 400
    assert forwards.to_str() == backwards.to_str()


def test_training_shortens_text(corpus: Path, tokenizer: Tokenizer) -> None:
    text = (corpus / "ast.py").read_text(encoding="utf-8")
    assert len(tokenizer.encode_batch([text])[0]) < 0.6 * len(text)


def test_a_corpus_too_small_for_the_vocabulary_says_how_far_it_reaches() -> None:
    with pytest.raises(DataError, match=r"--vocab-size 300: .* for 261 tokens"):
        train_tokenizer(["ab ab ab"], 300)


def test_a_vocabulary_too_small_for_all_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=r"--vocab-size 258: .* at least 259"):
        train_tokenizer(["text"], 258)


def test_an_error_in_the_documents_ends_the_training_as_itself() -> None:
    def documents() -> Any:
        yield "fine"
        raise DataError("broken.txt")

    with pytest.raises(DataError, match=r"^broken\.txt$"):
        train_tokenizer(documents(), 300)


def test_the_saved_directory_carries_the_names_that_hugging_face_reads(tokenizer_dir: Path) -> None:
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    assert {config[key] for key in ("bos_token", "eos_token", "pad_token")} == set(SPECIAL_TOKENS)
    assert sorted(path.name for path in tokenizer_dir.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_directory_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match="taken: already exists"):
        save_tokenizer(train_tokenizer(["ab ab ab"], 260), tmp_path / "taken")
    assert list((tmp_path / "taken").iterdir()) == []


def test_the_identity_is_that_of_the_file(tokenizer_dir: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    definition = (tokenizer_dir / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(definition)
    assert Tokenizer.load(tmp_path).sha256 == tokenizer.sha256
    (tmp_path / "tokenizer.json").write_bytes(definition + b"\n")
    assert Tokenizer.load(tmp_path).sha256 != tokenizer.sha256


def without_pad(definition: dict[str, Any]) -> None:
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] != "<|pad|>"]
    definition["model"]["vocab"]["unused"] = definition["model"]["vocab"].pop("<|pad|>")


def with_an_end_that_text_can_write(definition: dict[str, Any]) -> None:
    definition["added_tokens"][1]["special"] = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_pad, r"no token named <\|pad\|>"),
        (with_an_end_that_text_can_write, r"text <\|end_text\|> in a document would become the control token"),
    ],
)
def test_a_tokenizer_unfit_for_the_pipeline_is_refused(
    tokenizer_dir: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    definition = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    change(definition)
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)


def test_a_missing_or_broken_tokenizer_is_named_with_the_next_action(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot read .* train-tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer .* train-tokenizer"):
        Tokenizer.load(tmp_path)
