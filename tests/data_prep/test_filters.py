import sys
import unicodedata
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.filters import LONGEST_NGRAM, REPEATS, FilterConfig, Filters, have_repeated_ngrams


def counters(filters: Filters) -> dict[str, int]:
    return dict(+filters.counters)


def test_without_filters_every_text_passes_as_it_is() -> None:
    filters = Filters(FilterConfig())
    for text in ("", "e\u0301", "x" * 10):
        assert filters.apply(text) is text
    assert filters.keep([np.zeros(1000, np.uint32)]) == [True]
    assert counters(filters) == {}


@given(text=st.text())
def test_normalisation_composes_and_counts_what_it_changes(text: str) -> None:
    filters = Filters(FilterConfig(normalize_nfc=True))
    normal = unicodedata.normalize("NFC", text)
    assert filters.apply(text) == normal
    assert filters.counters["nfc_changed"] == (normal != text)


@pytest.mark.parametrize(("length", "passes"), [(2, False), (3, True), (5, True), (6, False)])
def test_lengths_outside_the_bounds_are_left_out_and_counted(length: int, passes: bool) -> None:
    filters = Filters(FilterConfig(min_chars=3, max_chars=5))
    assert (filters.apply("x" * length) is not None) == passes
    assert sum(filters.counters.values()) == (not passes)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x" * (length - 1)}]
    assert (filters.apply_to_turns(turns) == turns) == passes


def test_chats_are_normalised_turn_by_turn_and_the_callers_stay_untouched() -> None:
    filters = Filters(FilterConfig(normalize_nfc=True))
    other: dict[str, object] = {"role": "assistant", "content": "ok", "extra": 1}
    turns: list[dict[str, object]] = [{"role": "user", "content": "e\u0301"}, other]
    assert filters.apply_to_turns(turns) == [{"role": "user", "content": "\u00e9"}, turns[1]]
    assert turns[0]["content"] == "e\u0301"
    assert counters(filters) == {"nfc_changed": 1}


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_filters.py").write_text(
        "def shout(text):\n"
        "    return None if 'drop' in text else text.upper()\n"
        "def broken(text):\n"
        "    return 1 / 0\n"
        "def wrong(text):\n"
        "    return 5\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_filters", raising=False)
    return "my_filters"


def test_a_users_function_changes_and_drops_and_is_counted(user_module: str) -> None:
    filters = Filters(FilterConfig(user=(f"{user_module}:shout",)))
    assert [filters.apply(text) for text in ("a", "DONE", "drop it")] == ["A", "DONE", None]
    assert counters(filters) == {"user my_filters:shout_changed": 1, "user my_filters:shout": 1}
    assert str(Path.cwd()) not in sys.path


def test_a_users_function_gets_every_turn_of_a_chat(user_module: str) -> None:
    filters = Filters(FilterConfig(user=(f"{user_module}:shout",)))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert filters.apply_to_turns(turns) == [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    assert filters.apply_to_turns([*turns, {"role": "user", "content": "drop it"}]) is None
    assert counters(filters) == {"user my_filters:shout_changed": 1, "user my_filters:shout": 1}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", r"user filter my_filters:broken: failed \(ZeroDivisionError.* on the text 'some text'"),
        ("wrong", r"user filter my_filters:wrong: returned int; it must return a text or None"),
    ],
)
def test_a_users_function_that_fails_is_named_with_the_text(user_module: str, function: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Filters(FilterConfig(user=(f"{user_module}:{function}",))).apply("some text")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_filters", "write it as module:function"),
        ("no_such_module_at_all:f", "cannot be imported"),
        ("my_filters:missing", "my_filters has no function missing"),
    ],
)
def test_a_users_function_that_is_not_there_is_refused_before_any_text(
    user_module: str, name: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Filters(FilterConfig(user=(name,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"deduplicate": "all"}, "'all' is none of none, documents"), ({"min_chars": 5, "max_chars": 4}, "5 to .* 4")],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        FilterConfig(**options)  # type: ignore[arg-type]


def brute_force(ids: npt.NDArray[np.uint32]) -> bool:
    tokens = ids.tolist()
    return any(
        tokens[start : start + length * REPEATS] == tokens[start : start + length] * REPEATS
        for length in range(1, LONGEST_NGRAM + 1)
        for start in range(len(tokens) - length * REPEATS + 1)
    )


@st.composite
def documents(draw: st.DrawFn) -> npt.NDArray[np.uint32]:
    """Random tokens around an n-gram that comes about `REPEATS` times in a row."""
    small = st.lists(st.integers(0, 2), max_size=20)
    ngram = draw(st.lists(st.integers(0, 2), min_size=1, max_size=LONGEST_NGRAM + 1))
    times = draw(st.integers(REPEATS - 2, REPEATS + 1))
    rest = draw(st.integers(0, len(ngram)))
    return np.array(draw(small) + ngram * times + ngram[:rest] + draw(small), np.uint32)


@given(batch=st.lists(documents(), max_size=5))
def test_repeated_ngrams_are_found_as_by_trying_every_place(batch: list[npt.NDArray[np.uint32]]) -> None:
    assert have_repeated_ngrams(batch) == [brute_force(ids) for ids in batch]


def test_a_repeat_that_only_the_next_document_would_complete_is_none() -> None:
    halves = [np.zeros(REPEATS - 1, np.uint32), np.zeros(REPEATS - 1, np.uint32), np.zeros(0, np.uint32)]
    assert have_repeated_ngrams(halves) == [False, False, False]
    assert have_repeated_ngrams([*halves, np.zeros(REPEATS, np.uint32)]) == [False, False, False, True]


def test_documents_with_repeats_are_left_out_and_counted() -> None:
    filters = Filters(FilterConfig(repeated_ngrams=True))
    fine, bad = np.arange(500, dtype=np.uint32), np.tile(np.arange(13, dtype=np.uint32), 32)
    assert filters.keep([fine, bad, fine[:0], bad[1:], fine]) == [True, False, True, True, True]
    assert counters(filters) == {"repeated_ngrams": 1}
