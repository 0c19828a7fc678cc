import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.manifest import Manifest, smallest_dtype

Record = dict[str, Any]


def edit(dataset: Path, change: Callable[[Record], object]) -> None:
    path = dataset / "manifest.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_manifest_survives_the_disk(pristine: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(pristine)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert (tmp_path / "manifest.json").read_bytes() == (pristine / "manifest.json").read_bytes()


def test_the_counts_agree_with_each_other(pristine: Path) -> None:
    record = json.loads((pristine / "manifest.json").read_text())
    assert record["row_tokens"] == record["sequence_length"] + 1 == 256
    assert record["tokens"] == record["rows"] * 256
    assert record["rows"] == sum(part["rows"] for part in record["parts"])
    assert len(record["parts"]) > 2


CHANGES: dict[str, tuple[Callable[[Record], object], str]] = {
    "missing": (lambda record: record.pop("rows"), r"field rows is missing"),
    "text for a number": (lambda record: record.update(documents="12"), r"field documents = '12' .* type int"),
    "true for a number": (lambda record: record.update(documents=True), r"field documents = True .* type int"),
    "fraction": (lambda record: record.update(text_bytes=1.5), r"field text_bytes = 1\.5"),
    "negative": (lambda record: record.update(dropped_tokens=-1), r"field dropped_tokens = -1 should be at least 0"),
    "zero length": (lambda record: record.update(sequence_length=0), r"field sequence_length = 0"),
    "rows": (lambda record: record.update(rows=record["rows"] + 1), r"field rows = \d+ should be \d+"),
    "tokens": (lambda record: record.update(tokens=5), r"field tokens = 5"),
    "row_tokens": (lambda record: record.update(row_tokens=255), r"field row_tokens = 255 should be 256"),
    "padding": (lambda record: record.update(padding_tokens=-1), r"field padding_tokens = -1"),
    "counter": (lambda record: record["counters"].update(empty="3"), r"field counters\.empty = '3'"),
    "provenance": (lambda record: record.pop("provenance"), r"field provenance is missing"),
    "dtype": (lambda record: record.update(dtype="uint32"), r"field dtype = 'uint32' should be 'uint16'"),
    "not a number": (lambda record: record.update(unigram_entropy=float("nan")), r"field unigram_entropy = nan"),
    "unknown": (lambda record: record.update(colour="red"), r"field colour = 'red' is unknown"),
    "other format": (lambda record: record.update(format="parquet"), r"field format = 'parquet'"),
    "tokenizer": (lambda record: record.update(tokenizer="bpe"), r"field tokenizer = 'bpe' should be of type dict"),
    "short digest": (lambda record: record["tokenizer"].update(sha256="ab"), r"field tokenizer\.sha256 = 'ab'"),
    "special id": (
        lambda record: record["tokenizer"]["special_ids"].update({"<|pad|>": 600}),
        r"field tokenizer\.special_ids\.<\|pad\|> = 600 should be below vocab_size = 600",
    ),
    "no parts": (lambda record: record.update(parts=[]), r"field parts = \[\]"),
    "part is no object": (lambda record: record.update(parts=[1]), r"field parts\[0\] is no JSON object"),
    "part field": (lambda record: record["parts"][1].pop("bytes"), r"field parts\[1\]\.bytes is missing"),
    "part outside": (lambda record: record["parts"][0].update(path="../x"), r"field parts\[0\]\.path = '\.\./x'"),
    "swapped parts": (lambda record: record["parts"].reverse(), r"field fingerprint"),
    "other tokenizer": (lambda record: record["tokenizer"].update(sha256="0" * 64), r"field fingerprint"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_manifest_is_refused_by_field(
    dataset: Path, change: Callable[[Record], object], message: str
) -> None:
    edit(dataset, change)
    with pytest.raises(DataError, match=rf"dataset/manifest\.json: {message}.* rebuild with `rookery data build`"):
        Manifest.load(dataset)


def test_another_schema_version_is_named(dataset: Path) -> None:
    edit(dataset, lambda record: record.update(schema_version=99))
    with pytest.raises(DataError, match=r"schema_version = 99, but this rookery reads version 2; .*rebuild"):
        Manifest.load(dataset)


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_manifest_is_refused(
    pristine: Path, tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    text = (pristine / "manifest.json").read_text().rstrip()
    cut = tmp_path_factory.mktemp("cut")
    (cut / "manifest.json").write_text(text[: int(share * len(text))])
    with pytest.raises(DataError, match=r"manifest\.json: broken JSON at line \d+ .* rebuild"):
        Manifest.load(cut)


def test_a_manifest_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match=r"manifest\.json: field \(whole file\) is no JSON object"):
        Manifest.load(tmp_path)


def test_a_missing_dataset_and_a_missing_manifest_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone: no such dataset directory; make one with `rookery data build`"):
        Manifest.load(tmp_path / "gone")
    with pytest.raises(DataError, match=r"manifest\.json: missing, .* `rookery data build`"):
        Manifest.load(tmp_path)


def test_a_missing_part_is_named(dataset: Path) -> None:
    (dataset / "part-00001" / "c.0.0").unlink()
    with pytest.raises(DataError, match=r"part-00001/c\.0\.0: .* missing .* rebuild"):
        Manifest.load(dataset)


def test_a_part_of_the_wrong_size_is_named(dataset: Path) -> None:
    with (dataset / "part-00001" / "c.0.0").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"part-00001/c\.0\.0: \d+ bytes, but the manifest says \d+; .* rebuild"):
        Manifest.load(dataset)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
def test_a_token_takes_two_bytes_while_the_vocabulary_allows(vocab_size: int, dtype: str) -> None:
    assert smallest_dtype(vocab_size) == dtype
