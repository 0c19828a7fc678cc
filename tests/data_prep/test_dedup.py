import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import dedup
from data_prep.dedup import DuplicateRemover, Flags, Mode, Signatures
from data_prep.world import World
from slurm.local import rank_command, rank_environment

LONG = "".join(f"Here is sentence {name} of the text that follows.\n" for name in "abcdefghijklmnopqrst")

Units = list[list[str]]


def remaining(units: Units, mode: Mode, flags: dict[int, Flags]) -> list[list[str | None]]:
    result = []
    for number, texts in enumerate(units):
        remover = DuplicateRemover(mode, flags[number])
        result.append([remover.apply(text) for text in texts])
    return result


def deduplicate(units: Units, mode: Mode) -> list[list[str | None]]:
    signatures = Signatures(mode)
    for number, texts in reversed(list(enumerate(units))):  # the order of reading must not matter
        signatures.add_unit(number, texts)
    return remaining(units, mode, signatures.find_duplicates(World()))


@given(units=st.lists(st.lists(st.text("ab", max_size=3), max_size=6), max_size=6), per_round=st.integers(1, 50))
def test_of_equal_documents_the_first_in_the_order_of_the_corpus_stays(units: Units, per_round: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "_PER_ROUND", per_round)
        result = deduplicate(units, "documents")
    seen: set[str] = set()
    for texts, kept in zip(units, result, strict=True):
        for text, left in zip(texts, kept, strict=True):
            assert left == (None if text in seen else text)
            seen.add(text)


def test_a_document_differs_by_a_single_character() -> None:
    assert deduplicate([["a\n", "a"], ["A", "a"]], "documents") == [["a\n", "a"], ["A", None]]


@pytest.mark.parametrize("mode", ["lines", "sentences"])
def test_a_span_of_three_that_came_before_is_taken_out(mode: Mode) -> None:
    span = "One is here. \nTwo is there. \nThree is gone. \n"
    first, second = "Start of it. \n" + span + LONG, LONG.upper().replace("TEXT", "BOOK") + span
    expected = second.removesuffix(span)
    assert deduplicate([[first], [second]], mode) == [[first], [expected]]
    assert deduplicate([[span + LONG, second]], mode) == [[span + LONG, expected]]


def test_two_equal_lines_are_not_enough() -> None:
    pair = "One is here.\nTwo is there.\n"
    second = pair + LONG.replace("text", "book")
    assert deduplicate([[pair + "x\n" + LONG], [second]], "lines") == [[pair + "x\n" + LONG], [second]]


def test_case_accents_punctuation_and_numbers_do_not_tell_lines_apart() -> None:
    one, other = "Caf\u00e9 at 10, yes!\nA\nB\n", "cafe\u0301 (at 275) YES\na.\n b\n"
    assert deduplicate([[one + LONG], [other + LONG.replace("text", "book")]], "lines")[1] == [
        LONG.replace("text", "book")
    ]


def test_a_document_with_few_words_left_goes_altogether() -> None:
    remover_input = [[LONG], [LONG + "Only these words are new."]]
    assert deduplicate(remover_input, "lines") == [[LONG], [None]]
    signatures = Signatures("lines")
    for number, texts in enumerate(remover_input):
        signatures.add_unit(number, texts)
    remover = DuplicateRemover("lines", signatures.find_duplicates(World())[1])
    remover.apply(remover_input[1][0])
    assert dict(remover.counters) == {"duplicate_lines": 20, "duplicate_documents": 1}


def test_lines_without_words_are_never_duplicates() -> None:
    code = "}\n)\n{\n" * 5
    texts = [code + LONG.replace("text", word) for word in ("one", "two")]
    assert deduplicate([texts], "lines") == [texts]


@given(text=st.text("aB1.!? \n\"'", max_size=200))
@pytest.mark.parametrize("mode", ["lines", "sentences"])
def test_pieces_are_the_whole_text(mode: Mode, text: str) -> None:
    pieces = dedup._pieces(text, mode)
    assert "".join(pieces) == text
    assert all(pieces)


def test_sentences_end_where_a_blank_follows() -> None:
    text = 'It is 3.14 now. "Really?" Yes... no!\nNext'
    assert dedup._pieces(text, "sentences") == ["It is 3.14 now. ", '"Really?" ', "Yes... ", "no!\n", "Next"]


@pytest.mark.timeout(20)
def test_long_runs_of_punctuation_are_read_once() -> None:
    assert len(dedup._pieces("." * 300_000 + "x" + "'" * 300_000, "sentences")) == 1


PROGRAM = """
import json, sys
from data_prep import dedup
from data_prep.world import World
dedup._PER_ROUND = 7
units, mode, world = json.load(open(sys.argv[1])), sys.argv[2], World.discover()
signatures = dedup.Signatures(mode)
for number in range(world.rank, len(units), world.size):
    signatures.add_unit(number, units[number])
flags = {number: found.tolist() for number, found in signatures.find_duplicates(world).items()}
merged = {number: found for of_rank in world.allgather(flags) for number, found in of_rank.items()}
if world.rank == 0:
    print(json.dumps([merged[number] for number in range(len(units))]))
"""


@pytest.mark.parametrize("mode", ["documents", "lines"])
def test_one_two_and_three_ranks_find_the_same_duplicates(tmp_path: Path, mode: Mode) -> None:

    random = np.random.default_rng(0)
    units = [["\n".join(random.choice(list("abcd"), 4)) for _ in range(12)] for _ in range(7)]
    (tmp_path / "units.json").write_text(json.dumps(units))
    found = []
    for ranks in (1, 2, 3):
        command = rank_command(ranks, [sys.executable, "-c", PROGRAM, str(tmp_path / "units.json"), mode])
        found.append(
            subprocess.run(
                command, env=rank_environment(ranks), capture_output=True, text=True, timeout=120, check=True
            )
        )
    assert found[0].stdout == found[1].stdout == found[2].stdout
    flags = [flag for unit in json.loads(found[0].stdout) for flag in unit]
    assert 10 < sum(flags) < len(flags)
