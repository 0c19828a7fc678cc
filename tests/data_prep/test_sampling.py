import json
from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.readers import ReaderOptions, plan_items
from data_prep.sampling import LONGEST_TEXT, CorpusSample, Source

LINES = ReaderOptions(text_documents="lines")


def source(directory: Path, name: str, files: int, lines: int = 100, weight: float = 1.0) -> Source:
    """A source of files, each with `lines` documents of 10 characters that tell their source, file and line."""
    (directory / name).mkdir(parents=True)
    for file in range(files):
        text = "".join(f"{name}{file:04d}/{line:04d}\n" for line in range(lines))
        (directory / name / f"{file:04d}.txt").write_text(text)
    return Source(name, plan_items([directory / name], LINES), weight)


def test_shares_follow_the_weights(tmp_path: Path) -> None:
    sources = [source(tmp_path, "a", 5, weight=3), source(tmp_path, "b", 50), source(tmp_path, "c", 5, weight=0)]
    sample = CorpusSample(sources, 4000, LINES)
    texts = list(sample)
    assert sample.taken == {"a": 3000, "b": 1000}
    assert sum(map(len, texts)) == 4000
    assert {text[0] for text in texts} == {"a", "b"}


def test_a_share_comes_from_all_over_its_source(tmp_path: Path) -> None:
    for files in (10, 300):
        texts = list(CorpusSample([source(tmp_path / str(files), "a", files)], 6400, LINES))
        assert len({text[:5] for text in texts}) == min(files, 64)
        assert len(set(texts)) == len(texts)


def test_files_that_are_short_are_made_up_for_by_others(tmp_path: Path) -> None:
    source(tmp_path, "a", 20, lines=1)
    source(tmp_path, "b", 20, lines=100)
    both = Source("both", plan_items([tmp_path / "a", tmp_path / "b"], LINES))
    # 40 equal parts would be 250 characters, of which half of the files have only 10.
    assert 9000 < sum(map(len, CorpusSample([both], 10_000, LINES))) <= 10_000


def test_a_source_smaller_than_its_share_is_taken_whole(tmp_path: Path) -> None:
    sample = CorpusSample([source(tmp_path, "a", 3, lines=7), source(tmp_path, "b", 3)], 10_000, LINES)
    assert len(set(sample)) == 3 * 7 + 300
    assert sample.taken == {"a": 210, "b": 3000}


def test_the_sample_depends_on_the_seed_and_not_on_where_the_corpus_lies(tmp_path: Path) -> None:
    here, there = (source(tmp_path / place, "a", 100) for place in ("here", "there"))
    first = CorpusSample([here], 2000, LINES)
    assert list(first) == list(first) == list(CorpusSample([there], 2000, LINES))
    assert list(first) != list(CorpusSample([here], 2000, LINES, seed=1))


def test_long_documents_count_for_their_beginning_and_chats_for_what_was_said(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    lines = [json.dumps({"text": "x" * 100_000}), json.dumps({"messages": turns})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    texts = list(CorpusSample([Source("a", plan_items([tmp_path / "a.jsonl"]))], 10**6))
    assert texts == ["x" * LONGEST_TEXT, "hi\nho"]


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (("a", "a"), (1.0, 1.0), "a, a: each needs a name of its own"),
        (("a", "b"), (1.0, -1.0), r"source b: weight -1\.0"),
        (("a", "b"), (0.0, 0.0), "none has a weight above 0"),
    ],
)
def test_sources_that_make_no_sense_are_refused(
    names: tuple[str, ...], weights: tuple[float, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        CorpusSample([Source(name, (), weight) for name, weight in zip(names, weights, strict=True)], 10)
