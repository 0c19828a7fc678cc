import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data_prep import engine as engine_module
from data_prep.engine import DOCUMENTS_PER_CHECK, Encode, Engine, choose_engine, difficult_texts
from data_prep.errors import DataError
from data_prep.tokenizer import Tokenizer
from slurm.local import rank_command, rank_environment

FAST = ("gigatoken", "fastokens")
CHARACTERS = [chr(code) for code in range(0x2_0000) if not 0xD800 <= code < 0xE000]


@pytest.fixture(scope="module")
def reference(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir)


@pytest.fixture(scope="module", params=FAST)
def fast(request: pytest.FixtureRequest, tokenizer_dir: Path) -> Engine:
    engine = choose_engine(tokenizer_dir, ["some text"], request.param)
    assert engine.name == request.param, engine.note
    return engine


def assert_identical(engine: Engine, reference: Tokenizer, texts: Sequence[str]) -> None:
    for text, ids, expected in zip(texts, engine.encode_batch(texts), reference.encode_batch(texts), strict=True):
        assert ids.dtype == np.uint32
        np.testing.assert_array_equal(ids, expected, err_msg=ascii(text[:80]))


def test_ids_are_those_of_tokenizers_on_difficult_texts_and_files(
    fast: Engine, reference: Tokenizer, corpus: Path
) -> None:
    assert_identical(fast, reference, difficult_texts())
    assert_identical(fast, reference, [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())])


@pytest.mark.parametrize("pattern", ["{0}a ", "x{0}", " {0}{0}1"])
def test_ids_are_those_of_tokenizers_for_every_character(fast: Engine, reference: Tokenizer, pattern: str) -> None:
    assert_identical(fast, reference, ["".join(pattern.format(character) for character in CHARACTERS)])


@given(texts=st.lists(st.text(), max_size=5))
def test_ids_are_those_of_tokenizers_on_any_text(fast: Engine, reference: Tokenizer, texts: list[str]) -> None:
    assert_identical(fast, reference, texts)


def test_the_letters_of_special_tokens_are_text(fast: Engine, reference: Tokenizer) -> None:
    special = list(reference.special_tokens.values())
    for name, ids in zip(reference.special_tokens, fast.encode_batch(list(reference.special_tokens)), strict=True):
        assert not np.isin(ids, special).any()
        assert reference.decode(ids) == name


def test_half_of_a_surrogate_pair_is_refused_with_its_place(fast: Engine) -> None:
    with pytest.raises(DataError, match=r"document 1 of a batch: character 2 .*'ok\\ud800'.* on_bad_document"):
        fast.encode_batch(["fine", "ok\ud800"])


def test_auto_takes_the_fastest(tokenizer_dir: Path) -> None:
    engine = choose_engine(tokenizer_dir, ["text"])
    assert (engine.name, engine.note) == ("gigatoken", None)


def test_an_encoder_that_is_not_installed_is_passed_over_and_named(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "find_spec", lambda name: None)
    engine = choose_engine(tokenizer_dir, ["text"])
    assert engine.name == "tokenizers"
    assert engine.note == "gigatoken is not installed; fastokens is not installed"
    with pytest.raises(DataError, match="engine: gigatoken is not installed; `pip install gigatoken`"):
        choose_engine(tokenizer_dir, ["text"], "gigatoken")


def test_an_unknown_engine_is_refused(tokenizer_dir: Path) -> None:
    with pytest.raises(DataError, match="engine: 'fast' is none of auto, gigatoken, fastokens, tokenizers"):
        choose_engine(tokenizer_dir, ["text"], "fast")


def test_a_split_pattern_that_gigatoken_does_not_know_goes_to_the_next(tokenizer_dir: Path, tmp_path: Path) -> None:
    definition = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    engine = choose_engine(tmp_path, ["one two"])
    assert engine.name != "gigatoken"
    assert engine.note is not None
    assert "gigatoken cannot use this tokenizer" in engine.note
    assert_identical(engine, Tokenizer.load(tmp_path), ["one two", "\u00e9 12"])


def wrong_about(word: str) -> Any:
    """An encoder that is `tokenizers`, except for texts with `word` in them."""

    def make(definition: str, threads: bool) -> Encode:
        model = tokenizers.Tokenizer.from_str(definition)
        return lambda texts: [np.array(model.encode(text).ids, np.uint32) + (word in text) for text in texts]

    return make


@pytest.fixture
def with_encoder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts an encoder in the place of the fast ones, under the name `json`, which is always installed."""
    return lambda make: monkeypatch.setattr(engine_module, "_FAST", {"json": make})


def test_a_mismatch_on_the_users_corpus_falls_back_and_names_the_text(tokenizer_dir: Path, with_encoder: Any) -> None:
    with_encoder(wrong_about("zebra"))
    fine = choose_engine(tokenizer_dir, ["a horse"])
    assert (fine.name, fine.note) == ("json", None)
    engine = choose_engine(tokenizer_dir, ["a horse", "horse " * 500 + "zebra " + "horse " * 500])
    assert engine.name == "tokenizers"
    assert engine.note is not None
    assert engine.note.startswith("json gives other ids for the text '")
    assert "zebra" in engine.note
    assert len(engine.note) < 150


def test_an_encoder_that_panics_is_passed_over(tokenizer_dir: Path, with_encoder: Any) -> None:
    class PanicError(BaseException):
        """As Rust's, which is no Exception."""

    def make(definition: str, threads: bool) -> Encode:
        def encode(texts: list[str]) -> list[np.ndarray]:
            raise PanicError("stack overflow")

        return encode

    with_encoder(make)
    engine = choose_engine(tokenizer_dir, ["text"])
    assert engine.name == "tokenizers"
    assert engine.note == "json cannot use this tokenizer, at the text 'text' (stack overflow)"


def test_the_check_that_runs_along_finds_a_difference_within_a_thousand_documents(
    tokenizer_dir: Path, with_encoder: Any
) -> None:
    with_encoder(wrong_about("zebra"))
    engine = choose_engine(tokenizer_dir, ["a horse"])
    engine.encode_batch(["a zebra unseen" if number else "first" for number in range(DOCUMENTS_PER_CHECK)])
    engine.encode_batch(["seen, fine"])
    engine.encode_batch(["x"] * (DOCUMENTS_PER_CHECK - 2))
    engine.encode_batch(["zebra unseen"])
    with pytest.raises(DataError, match=r"json: gives other ids .* 'a zebra'; build again with engine: tokenizers"):
        engine.encode_batch(["a zebra", "x"])


def test_of_a_long_document_the_check_looks_at_a_part(tokenizer_dir: Path, with_encoder: Any) -> None:
    with_encoder(wrong_about("zebra"))
    engine = choose_engine(tokenizer_dir, ["a horse"])
    horses = "horse " * 7_000
    with pytest.raises(DataError, match="zebra"):
        engine.encode_batch([horses + "zebra " + horses])


def test_an_encoder_that_hoards_memory_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_CHARACTERS_PER_LOOK", 100)
    monkeypatch.setattr(engine_module, "_MEMORY_GROWTH", 50 * 2**20)
    made: list[list[bytearray]] = []

    def make() -> Encode:
        hoard: list[bytearray] = []
        made.append(hoard)

        def encode(texts: list[str]) -> list[np.ndarray]:
            hoard.append(bytearray(b"x" * (20 * 2**20)))
            return [np.full(len(text), len(made), np.uint32) for text in texts]

        return encode

    encode = engine_module._Renewed(make)
    generations = [int(encode(["x" * 60])[0][0]) for _ in range(4)]
    assert generations == [1, 1, 1, 1]  # 240 characters: looked at once, at 40 MiB
    made[0].append(bytearray(b"x" * (60 * 2**20)))
    assert [int(encode(["x" * 60])[0][0]) for _ in range(3)] == [2, 2, 2]
    made[0].clear()


ON_RANKS = """
import sys, warnings
from pathlib import Path
from data_prep import engine
from data_prep.tokenizer import Tokenizer
from data_prep.world import World
world = World.discover()
def wrong_about_zzz(definition, threads):
    reference = Tokenizer.load(Path(sys.argv[1]))
    return lambda texts: [ids[:-1] if "ZZZ" in text else ids for text, ids in zip(texts, reference.encode_batch(texts))]
engine._FAST = {"json": wrong_about_zzz}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    chosen = engine.agree_on_engine(Path(sys.argv[1]), ["aaa", "ZZZ"][: world.rank + 1], "auto", world)
warned = [str(each.message) for each in caught if "slower" in str(each.message)]
Path(sys.argv[2], str(world.rank)).write_text("\\n".join([chosen.name, *warned]))
"""


def test_all_ranks_use_an_encoder_that_is_right_on_every_one(tokenizer_dir: Path, tmp_path: Path) -> None:
    command = rank_command(2, [sys.executable, "-c", ON_RANKS, str(tokenizer_dir), str(tmp_path)])
    environment = {**rank_environment(2), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, env=environment, check=True, timeout=120)
    first, second = ((tmp_path / str(rank)).read_text().split("\n") for rank in range(2))
    assert first[0] == second[0] == "tokenizers"
    assert "json gives other ids for the text 'ZZZ'" in first[1]
    assert second[1:] == []
