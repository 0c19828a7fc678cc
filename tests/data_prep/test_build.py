import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data_prep.build import BuildReport, build_dataset
from data_prep.config import BuildConfig
from data_prep.errors import DataError
from data_prep.filters import FilterConfig
from data_prep.manifest import Manifest
from data_prep.readers import ReaderOptions
from data_prep.shards import RowReader
from data_prep.tokenizer import Tokenizer
from data_prep.verify import verify_dataset
from data_prep.world import World

SMALL_UNITS = BuildConfig(unit_bytes=30_000)


def rows_of(dataset: Path) -> npt.NDArray[Any]:
    reader = RowReader(dataset, Manifest.load(dataset))
    rows = np.stack([reader.row(index) for index in range(len(reader))])
    reader.close()
    return rows


def documents_in(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_rows_are_the_documents_one_after_another_between_begin_and_end(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(tokenizer_dir)
    config = BuildConfig(unit_bytes=2**30)
    manifest = build_dataset([corpus], tokenizer_dir, 255, tmp_path / "out", World(), config=config)
    stream: list[int] = []
    for path in documents_in(corpus):
        stream += [tokenizer.begin_id, *tokenizer.encode_batch([path.read_text()])[0].tolist(), tokenizer.end_id]
    count = len(stream) // 256
    np.testing.assert_array_equal(rows_of(tmp_path / "out"), np.array(stream[: count * 256]).reshape(count, 256))
    assert (manifest.rows, manifest.tokens, manifest.dropped_tokens) == (count, count * 256, len(stream) - count * 256)
    assert manifest.documents == len(documents_in(corpus))
    assert manifest.text_bytes == sum(path.stat().st_size for path in documents_in(corpus))
    assert manifest.tokenizer_sha256 == tokenizer.sha256
    assert manifest.special_ids == tokenizer.special_ids
    assert Manifest.load(tmp_path / "out") == manifest
    assert verify_dataset(tmp_path / "out") == []


def test_units_hold_whole_documents_in_order_and_drop_only_their_tails(pristine: Path, corpus: Path) -> None:
    manifest = Manifest.load(pristine)
    begin = manifest.special_ids["<|begin_text|>"]
    rows = rows_of(pristine)
    start = 0
    for part in manifest.parts:
        assert rows[start, 0] == begin
        start += part.rows
    assert 0 < manifest.dropped_tokens < 256 * len(manifest.parts)
    assert (rows == begin).sum() <= manifest.documents == len(documents_in(corpus))


def test_the_unigram_entropy_is_that_of_the_stored_tokens(pristine: Path) -> None:
    _, counts = np.unique(rows_of(pristine), return_counts=True)
    shares = counts / counts.sum()
    assert math.isclose(Manifest.load(pristine).unigram_entropy, -(shares * np.log(shares)).sum(), rel_tol=1e-8)


def test_control_tokens_written_in_a_document_do_not_end_it(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one <|end_text|> two <|begin_text|> three <|pad|>\n" * 50)
    manifest = build_dataset([tmp_path / "a.txt"], tokenizer_dir, 15, tmp_path / "out", World())
    rows = rows_of(tmp_path / "out")
    assert (rows == manifest.special_ids["<|begin_text|>"]).sum() == 1
    assert (rows == manifest.special_ids["<|end_text|>"]).sum() + (manifest.dropped_tokens > 0) == 1
    assert not (rows == manifest.special_ids["<|pad|>"]).any()


def test_the_fingerprint_follows_the_content_and_not_the_names(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, path in enumerate(documents_in(corpus)):
        (renamed / f"{number:02d}.txt").write_bytes(path.read_bytes())

    def fingerprint(source: Path, name: str, sequence_length: int = 255) -> str:
        return build_dataset([source], tokenizer_dir, sequence_length, tmp_path / name, World()).fingerprint

    original = fingerprint(corpus, "a")
    assert fingerprint(renamed, "b") == original
    assert fingerprint(corpus, "c", sequence_length=256) != original
    first = renamed / "00.txt"
    first.write_text(first.read_text().replace("a", "b", 1))
    assert fingerprint(renamed, "d") != original


def test_the_form_of_the_corpus_does_not_matter(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [path.read_text() for path in documents_in(corpus)]
    lines = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    pq.write_table(pa.table({"text": texts}), tmp_path / "c.parquet", row_group_size=3)
    config = BuildConfig(unit_bytes=2**30)

    def fingerprint(source: Path) -> str:
        out = tmp_path / f"{source.name}.out"
        return build_dataset([source], tokenizer_dir, 255, out, World(), config=config).fingerprint

    assert (
        len({fingerprint(source) for source in (corpus, lines, tmp_path / "b.jsonl.gz", tmp_path / "c.parquet")}) == 1
    )


def test_a_unit_that_holds_more_than_expected_is_written_in_pieces(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.units._SMALLEST_LIMIT", 1000)
    lines = write_jsonl(
        tmp_path / "a.jsonl", [f"{number} the same words again and again" * 3 for number in range(2000)]
    )
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    config = BuildConfig(unit_bytes=20_000)
    manifest = build_dataset([tmp_path / "a.jsonl.gz"], tokenizer_dir, 31, tmp_path / "out", World(), config=config)
    assert {"part-00000", "part-00000-001"} < {part.path for part in manifest.parts}
    assert manifest.documents == 2000
    assert (rows_of(tmp_path / "out") == manifest.special_ids["<|begin_text|>"]).sum() > 1900
    assert verify_dataset(tmp_path / "out") == []


def test_best_fit_packing_pads_and_cuts_no_document_that_fits(tokenizer_dir: Path, tmp_path: Path) -> None:
    texts = [f"a short text, number {number}" for number in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    config = BuildConfig(packing="best-fit")
    manifest = build_dataset([path], tokenizer_dir, 63, tmp_path / "out", World(), config=config)
    rows = rows_of(tmp_path / "out")
    ids = manifest.special_ids
    assert manifest.packing == "best-fit"
    assert (rows == ids["<|pad|>"]).sum() == manifest.padding_tokens > 0
    assert (manifest.dropped_tokens, manifest.split_documents) == (0, 0)
    assert (rows[:, 0] == ids["<|begin_text|>"]).all()
    assert (rows == ids["<|end_text|>"]).sum() == 100


def test_filters_are_applied_and_counted(tokenizer_dir: Path, tmp_path: Path) -> None:
    texts = ["twice the same text " * 3, "short", "twice the same text " * 3, "e\u0301 " * 40, "", "na " * 500]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    filters = FilterConfig(normalize_nfc=True, min_chars=10, deduplicate="documents", repeated_ngrams=True)
    config = BuildConfig(filters=filters)
    manifest = build_dataset([path], tokenizer_dir, 7, tmp_path / "out", World(), config=config)
    assert manifest.documents == 1
    assert manifest.counters == {
        "duplicate_documents": 1, "nfc_changed": 1, "repeated_ngrams": 2, "too_short": 2,
    }  # fmt: skip


def test_a_validation_split_and_the_rest_are_the_corpus(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    documents = 0
    for split in ("train", "validation"):
        config = BuildConfig(validation_fraction=0.5, split=split)
        manifest = build_dataset([corpus], tokenizer_dir, 31, tmp_path / split, World(), config=config)
        assert manifest.counters["other_split"] == 10 - manifest.documents
        documents += manifest.documents
    assert documents == 10


def test_chats_come_with_loss_masks(tokenizer_dir: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What is it? <|end_turn|>"}, {"role": "assistant", "content": "It is that."}]
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 50)
    manifest = build_dataset([tmp_path / "a.jsonl"], tokenizer_dir, 31, tmp_path / "out", World())
    tokenizer = Tokenizer.load(tokenizer_dir)
    assert manifest.documents == 50
    assert all(part.mask_bytes for part in manifest.parts)
    rows = rows_of(tmp_path / "out")
    turn_ends = (rows == tokenizer.special_tokens["<|end_turn|>"]).sum()
    assert 90 <= turn_ends <= 100  # two a chat, none from the text
    assert verify_dataset(tmp_path / "out") == []


def test_bad_documents_are_skipped_counted_and_listed(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").touch()
    config = BuildConfig(readers=ReaderOptions(on_bad_document="skip"))
    inputs = [tmp_path / "bad.txt", tmp_path / "empty.txt", corpus]
    manifest = build_dataset(inputs, tokenizer_dir, 255, tmp_path / "out", World(), config=config)
    assert manifest.counters["skipped"] == 1
    assert manifest.documents == 10
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert len(listed) == 1
    assert listed[0].startswith(f"{tmp_path / 'bad.txt'}: not UTF-8 at byte 3")


def test_a_manifest_tells_where_a_dataset_comes_from(pristine: Path, corpus: Path, tokenizer_dir: Path) -> None:
    provenance = Manifest.load(pristine).provenance
    assert provenance["inputs"] == [str(corpus)]
    assert provenance["files"] == 10
    assert provenance["file_bytes"] == sum(path.stat().st_size for path in documents_in(corpus))
    assert provenance["settings"]["sequence_length"] == 255
    assert (pristine / "tokenizer" / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()


def test_progress_ends_with_everything_done(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    reports: list[BuildReport] = []
    build_dataset([corpus], tokenizer_dir, 255, tmp_path / "out", World(), config=SMALL_UNITS, progress=reports.append)
    assert len(reports) > 2
    assert [report.bytes_done for report in reports] == sorted(report.bytes_done for report in reports)
    last = reports[-1]
    assert last.bytes_done == last.bytes_total == sum(path.stat().st_size for path in documents_in(corpus))


def test_what_is_already_built_is_left_alone_and_anything_else_refused(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    manifest = build_dataset([corpus], tokenizer_dir, 255, out, World())
    before = (out / "manifest.json").stat().st_mtime_ns
    assert build_dataset([corpus], tokenizer_dir, 255, out, World()) == manifest
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"out: already exists"):
        build_dataset([corpus], tokenizer_dir, 127, out, World())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


Arguments = dict[str, Any]


def short_rows(arguments: Arguments, tmp_path: Path) -> None:
    arguments["sequence_length"] = 0


def existing_out(arguments: Arguments, tmp_path: Path) -> None:
    arguments["out"].mkdir()


def bad_document(arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"text " * 200_000 + b"\xff")  # the largest unit, hence the first
    arguments["inputs"] = [*arguments["inputs"], tmp_path / "bad.txt"]


def missing_document(arguments: Arguments, tmp_path: Path) -> None:
    arguments["inputs"] = [tmp_path / "gone.txt"]


def missing_tokenizer(arguments: Arguments, tmp_path: Path) -> None:
    arguments["tokenizer_dir"] = tmp_path / "no-tokenizer"


def too_few_tokens(arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("    " * 70)
    arguments["inputs"] = [tmp_path / "short.txt"]


def empty_files(arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    arguments["inputs"] = [tmp_path / "empty.jsonl"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (short_rows, r"--sequence-length 0: "),
        (existing_out, r"out: already exists .* name another directory"),
        (bad_document, r"bad\.txt: not UTF-8 at byte 1000000"),
        (missing_document, r"gone\.txt: no such file"),
        (missing_tokenizer, r"no-tokenizer/tokenizer\.json: cannot read"),
        (too_few_tokens, r"--sequence-length 255: .* one row of 256 tokens \(\d+ tokens in 1 units of work\)"),
        (empty_files, r"--sequence-length 255: .* one row of 256 tokens \(0 tokens in 1 units of work\)"),
    ],
)
def test_what_cannot_be_built_is_named_and_leaves_nothing_behind(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, spoil: Callable[[Arguments, Path], None], message: str
) -> None:
    arguments: Arguments = {
        "inputs": [corpus], "tokenizer_dir": tokenizer_dir, "sequence_length": 255, "out": tmp_path / "out",
        "world": World(), "config": SMALL_UNITS,
    }  # fmt: skip
    spoil(arguments, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        build_dataset(**arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_appears_meanwhile_is_not_overwritten(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def rival(_report: BuildReport) -> None:
        out.mkdir(exist_ok=True)
        (out / "theirs").write_text("precious")

    with pytest.raises(DataError, match="out: already exists"):
        build_dataset([corpus], tokenizer_dir, 255, out, World(), progress=rival)
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert (out / "theirs").read_text() == "precious"
