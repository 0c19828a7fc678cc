import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    ControlTokens,
    Tokenizer,
    adopt_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

TRAPS = [
    "<|end_text|>",
    "a<|begin_text|>b <|pad|> <|end_text|><|end_text|>\n",
    "<|begin_header|>Huginn<|end_header|><|c_3|><|>>-|><|?|>",
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
    assert not set(ids.tolist()) & set(tokenizer.special_tokens.values())
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
    ids = [tokenizer.special_tokens[name] for name in SPECIAL_TOKENS]
    assert tokenizer.decode(ids) == "".join(SPECIAL_TOKENS)


def test_special_tokens_are_the_last_ids_in_the_order_of_the_reference(tokenizer: Tokenizer) -> None:
    assert len(SPECIAL_TOKENS) == 36
    assert list(tokenizer.special_tokens) == list(SPECIAL_TOKENS)
    assert list(tokenizer.special_tokens.values()) == list(range(600 - 36, 600))
    assert tokenizer.vocab_size == 600
    assert tokenizer.special_ids == {"<|begin_text|>": 564, "<|end_text|>": 565, "<|pad|>": 569}
    assert (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id) == (564, 565, 569)


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
    with pytest.raises(DataError, match=r"--vocab-size 300: .* for 294 tokens"):
        train_tokenizer(["ab ab ab"], 300)


def test_a_vocabulary_too_small_for_all_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=r"--vocab-size 291: .* at least 292"):
        train_tokenizer(["text"], 291)


def test_an_error_in_the_documents_ends_the_training_as_itself() -> None:
    def documents() -> Any:
        yield "fine"
        raise DataError("broken.txt")

    with pytest.raises(DataError, match=r"^broken\.txt$"):
        train_tokenizer(documents(), 300)


def test_no_token_is_longer_than_32_characters() -> None:
    model = train_tokenizer(["-" * 400 + " " + "=" * 77] * 50, 304)
    assert max(len(token) for token in model.get_vocab(with_added_tokens=False)) <= 32


def test_the_saved_directory_carries_the_names_that_hugging_face_reads(tokenizer_dir: Path) -> None:
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    names = [config[key] for key in ("bos_token", "eos_token", "pad_token")]
    assert names == ["<|begin_text|>", "<|end_text|>", "<|pad|>"]
    assert sorted(path.name for path in tokenizer_dir.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_directory_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match="taken: already exists"):
        save_tokenizer(train_tokenizer(["ab ab ab"], 293), tmp_path / "taken")
    assert list((tmp_path / "taken").iterdir()) == []


def test_the_identity_is_that_of_the_file(tokenizer_dir: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    definition = (tokenizer_dir / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(definition)
    assert Tokenizer.load(tmp_path).sha256 == tokenizer.sha256
    (tmp_path / "tokenizer.json").write_bytes(definition + b"\n")
    assert Tokenizer.load(tmp_path).sha256 != tokenizer.sha256


def without_pad(definition: dict[str, Any]) -> None:
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] != "<|pad|>"]


def with_an_end_that_text_can_write(definition: dict[str, Any]) -> None:
    definition["added_tokens"][1]["special"] = False


def with_a_second_end(definition: dict[str, Any]) -> None:
    definition["added_tokens"].append({**definition["added_tokens"][1], "id": 600})


def with_two_of_one_id(definition: dict[str, Any]) -> None:
    definition["added_tokens"].append({**definition["added_tokens"][1], "content": "<|other|>"})


def with_another_end_in_the_vocabulary(definition: dict[str, Any]) -> None:
    definition["model"]["vocab"]["<|end_text|>"] = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_pad, r"no special token named <\|pad\|>; add them with"),
        (with_an_end_that_text_can_write, r"no special token named <\|end_text\|>"),
        (with_a_second_end, r"added_tokens has content <\|end_text\|> more than once"),
        (with_two_of_one_id, r"added_tokens has id 565 more than once"),
        (with_another_end_in_the_vocabulary, r"<\|end_text\|> has id 565 in added_tokens but 3 in the vocabulary"),
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


def test_a_special_token_that_merges_of_text_can_make_is_refused(tmp_path: Path) -> None:
    model = train_tokenizer(["ab ab ab"], 293)
    model.add_special_tokens(["ab"])
    save_tokenizer(model, tmp_path / "bpe")
    with pytest.raises(DataError, match="the text ab in a document would become the control token"):
        Tokenizer.load(tmp_path / "bpe")


def foreign(directory: Path, **config: Any) -> Path:
    """A tokenizer as others make them: one control token, another split, a length limit and a post-processor."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 3], trainer)
    model.enable_truncation(8)
    model.enable_padding(length=16)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    directory.mkdir()
    model.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_names_of_control_tokens_come_from_the_configuration_or_the_caller(tmp_path: Path) -> None:
    control = ControlTokens("<s>", "</s>", "<unk>")
    source = foreign(tmp_path / "foreign")
    adopt_tokenizer(source, control, tmp_path / "bpe")
    tokenizer = Tokenizer.load(tmp_path / "bpe")
    assert tokenizer.control == control
    config = json.loads((tmp_path / "bpe" / "tokenizer_config.json").read_text())
    config["bos_token"] = {"content": "</s>", "lstrip": False}
    config["eos_token"] = {"content": "<s>", "lstrip": False}
    (tmp_path / "bpe" / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path / "bpe").begin_id == tokenizer.end_id
    assert Tokenizer.load(tmp_path / "bpe", control).begin_id == tokenizer.begin_id


def test_a_foreign_tokenizer_gets_what_it_lacks_and_keeps_its_ids(tmp_path: Path) -> None:
    source = foreign(tmp_path / "foreign")
    control = ControlTokens(begin="<|begin|>", end="<|endoftext|>", pad="<|pad|>")
    with pytest.raises(DataError, match=r"no special token named <\|begin\|>, <\|pad\|>"):
        Tokenizer.load(source, control)
    before = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    adopt_tokenizer(source, control, tmp_path / "bpe")
    tokenizer = Tokenizer.load(tmp_path / "bpe")
    size = before.get_vocab_size()
    assert (tokenizer.end_id, tokenizer.begin_id, tokenizer.pad_id) == (0, size, size + 1)
    assert tokenizer.vocab_size == size + 2
    before.no_truncation()
    before.no_padding()
    text = "the quick brown fox " * 50
    assert tokenizer.encode_batch([text])[0].tolist() == before.encode(text, add_special_tokens=False).ids


def test_control_tokens_must_be_three(tmp_path: Path) -> None:
    name = "<|endoftext|>"
    with pytest.raises(DataError, match=r"begin, end and pad are .* but they must be three different tokens"):
        Tokenizer.load(foreign(tmp_path / "foreign", bos_token=name, eos_token=name, pad_token=name))


def test_a_broken_configuration_is_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    for content, message in (("{", "cannot be read"), ("[]", "is no JSON object")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(DataError, match=rf"tokenizer_config\.json: {message}"):
            Tokenizer.load(tmp_path)


def test_half_of_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    for encode in (lambda text: tokenizer.encode_batch(["fine", text]), tokenizer.encode_with_spans):
        with pytest.raises(DataError, match=r"character 3 is half of a surrogate pair, in 'bad\\ud834'"):
            encode("bad\ud834")


@given(text=st.text())
def test_spans_say_where_in_the_text_each_token_stands(tokenizer: Tokenizer, text: str) -> None:
    ids, spans = tokenizer.encode_with_spans(text)
    np.testing.assert_array_equal(ids, tokenizer.encode_batch([text])[0])
    for span, token in zip(spans.tolist(), ids.tolist(), strict=True):
        piece = tokenizer.decode([token])
        assert "\ufffd" in piece or text[span[0] : span[1]] == piece


def test_a_missing_or_broken_tokenizer_is_named_with_the_next_action(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot read .* train-tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer .* train-tokenizer"):
        Tokenizer.load(tmp_path)
