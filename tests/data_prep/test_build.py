import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data_prep.build import BuildReport, build_dataset
from data_prep.errors import DataError
from data_prep.manifest import Manifest
from data_prep.shards import RowReader
from data_prep.tokenizer import Tokenizer
from data_prep.world import World


def rows_of(dataset: Path) -> npt.NDArray[Any]:
    reader = RowReader(dataset, Manifest.load(dataset))
    rows = np.stack([reader.row(index) for index in range(len(reader))])
    reader.close()
    return rows


def documents_in(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def test_rows_are_the_documents_one_after_another_between_begin_and_end(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(tokenizer_dir)
    manifest = build_dataset([corpus], tokenizer_dir, 255, tmp_path / "out", World(), unit_bytes=2**30)
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


def test_progress_ends_with_everything_done(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    reports: list[BuildReport] = []
    build_dataset([corpus], tokenizer_dir, 255, tmp_path / "out", World(), unit_bytes=30_000, progress=reports.append)
    assert len(reports) > 2
    assert [report.bytes_done for report in reports] == sorted({report.bytes_done for report in reports})
    last = reports[-1]
    assert last.bytes_done == last.bytes_total == sum(path.stat().st_size for path in documents_in(corpus))
    assert last.documents_done == last.documents_total == len(documents_in(corpus))


Arguments = dict[str, Any]


def short_rows(arguments: Arguments, tmp_path: Path) -> None:
    arguments["sequence_length"] = 0


def existing_out(arguments: Arguments, tmp_path: Path) -> None:
    arguments["out"].mkdir()


def bad_document(arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"text " * 20_000 + b"\xff")
    arguments["inputs"] = [*arguments["inputs"], tmp_path / "bad.txt"]


def missing_document(arguments: Arguments, tmp_path: Path) -> None:
    arguments["inputs"] = [tmp_path / "gone.txt"]


def missing_tokenizer(arguments: Arguments, tmp_path: Path) -> None:
    arguments["tokenizer_dir"] = tmp_path / "no-tokenizer"


def too_few_bytes(arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    arguments["inputs"] = [tmp_path / "short.txt"]


def too_few_tokens(arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("    " * 70)
    arguments["inputs"] = [tmp_path / "short.txt"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (short_rows, r"--sequence-length 0: "),
        (existing_out, r"out: already exists .* --out"),
        (bad_document, r"bad\.txt: not UTF-8 at byte 100000"),
        (missing_document, r"gone\.txt: no such file"),
        (missing_tokenizer, r"no-tokenizer/tokenizer\.json: cannot read"),
        (too_few_bytes, r"--sequence-length 255: .* one row of 256 tokens \(its 1 documents hold at most 7 tokens\)"),
        (too_few_tokens, r"--sequence-length 255: .* one row of 256 tokens \(\d+ tokens in 1 work units\)"),
    ],
)
def test_what_cannot_be_built_is_named_and_leaves_nothing_behind(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, spoil: Callable[[Arguments, Path], None], message: str
) -> None:
    arguments: Arguments = {
        "inputs": [corpus], "tokenizer_dir": tokenizer_dir, "sequence_length": 255, "out": tmp_path / "out",
        "world": World(), "unit_bytes": 30_000,
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
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "theirs").read_text() == "precious"
