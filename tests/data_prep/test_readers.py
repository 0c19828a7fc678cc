"""Every format, plain and compressed, whole and in pieces, good and bad."""

import gzip
import json
import math
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.readers import ReaderOptions, plan_items, read_documents, read_item

ROOT = Path(__file__).resolve().parents[2]
SKIP = ReaderOptions(on_bad_document="skip")
TEXTS = [f"document {number} \u00e9\U0001f600 " + "word " * (number % 17) for number in range(500)]
Write = Callable[[Path, bytes], Path]


def plain(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def gzipped(path: Path, content: bytes) -> Path:
    """Two members, as `cat a.gz b.gz` makes them."""
    half = len(content) // 2
    return plain(path.with_name(path.name + ".gz"), gzip.compress(content[:half]) + gzip.compress(content[half:]))


def zstded(path: Path, content: bytes) -> Path:
    half = len(content) // 2
    frames = [zstandard.ZstdCompressor().compress(piece) for piece in (content[:half], content[half:])]
    return plain(path.with_name(path.name + ".zst"), b"".join(frames))


ALL_WRITERS = pytest.mark.parametrize("write", [plain, gzipped, zstded])


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": 7, "text": text}).encode() + b"\n" for text in texts)


def parquet(path: Path, texts: list[Any], rows_per_group: int = 100, **columns: list[Any]) -> Path:
    pq.write_table(
        pa.table({"id": list(range(len(texts))), "text": texts, **columns}), path, row_group_size=rows_per_group
    )
    return path


def texts_of(*inputs: Path, options: ReaderOptions | None = None) -> list[str | None]:
    return [document.text for document in read_documents(inputs, options)]


def skipping(*inputs: Path, options: ReaderOptions = SKIP) -> tuple[list[str | None], list[str]]:
    problems: list[str] = []
    found = read_documents(inputs, options, lambda problem: problems.append(str(problem)))
    return [document.text for document in found], problems


@ALL_WRITERS
def test_json_lines_are_read_in_order(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(TEXTS))
    assert texts_of(path) == TEXTS
    assert [document.origin for document in read_documents([path])][1].startswith(f"{path}, line at byte ")


@ALL_WRITERS
@pytest.mark.parametrize("item_bytes", [1, 100, 3_000, 10**9])
def test_pieces_of_a_file_together_are_the_file(tmp_path: Path, write: Write, item_bytes: int) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(TEXTS))
    items = plan_items([path], item_bytes=item_bytes)
    if write is not plain:
        assert len(items) <= 8
    assert [document.text for item in items for document in read_item(item)] == TEXTS


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=5)),
    ends_with_newline=st.booleans(),
    item_bytes=st.integers(1, 20),
)
def test_any_cut_of_any_lines_loses_and_repeats_nothing(
    tmp_path: Path, lines: list[str], ends_with_newline: bool, item_bytes: int
) -> None:
    content = ("\n".join(lines) + "\n" * ends_with_newline).encode()
    path = plain(tmp_path / "a.txt", content)
    options = ReaderOptions(text_documents="lines")
    found = [d.text for item in plan_items([path], options, item_bytes) for d in read_item(item, options)]
    mark = content.startswith(b"\xef\xbb\xbf")
    raw = content[3 * mark :].split(b"\n")
    assert found == [line.rstrip(b"\r").decode() for line in raw if line and not line.isspace()]


@pytest.mark.parametrize("rows_per_group", [7, 500])
def test_parquet_is_read_by_row_groups(tmp_path: Path, rows_per_group: int) -> None:
    path = parquet(tmp_path / "a.parquet", TEXTS, rows_per_group)
    items = plan_items([path], item_bytes=1000)
    groups = math.ceil(len(TEXTS) / rows_per_group)
    assert 1 <= len(items) <= groups
    assert (len(items) > 1) == (groups > 1)
    assert [document.text for item in items for document in read_item(item)] == TEXTS
    assert next(read_item(items[-1])).origin.startswith(f"{path}, row ")


def test_a_text_file_is_one_document_without_any_change(tmp_path: Path) -> None:
    text = "\ufeffone\r\ntwo\x00\u00e9\n"
    assert texts_of(plain(tmp_path / "a.txt", text.encode())) == [text]
    assert texts_of(gzipped(tmp_path / "b.md", text.encode())) == [text]


def test_a_source_tree_gives_a_document_a_file_and_none_for_an_empty_one(tmp_path: Path) -> None:
    for name, text in (("a/__init__.py", ""), ("a/b.py", "b = 1\n"), ("c.h", "int c;\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert texts_of(tmp_path) == ["int c;\n", "b = 1\n"]


def test_lines_of_text_may_be_documents(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.txt", b"one\r\n\n  \ntwo\nthree")
    assert texts_of(path, options=ReaderOptions(text_documents="lines")) == ["one", "two", "three"]


@pytest.mark.parametrize("name", ["a.json", "a.anything", "noext"])
def test_json_lines_are_known_by_their_content(tmp_path: Path, name: str) -> None:
    assert texts_of(plain(tmp_path / name, jsonl(["x", "y"]))) == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (jsonl(TEXTS).replace(b"text", b"body"), "no field text or messages"),
        (b"{broken\n" + jsonl(TEXTS), "broken JSON"),
        (b'{"text": "\xff"}\n' + jsonl(TEXTS), "not UTF-8"),
    ],
)
def test_json_lines_that_cannot_be_used_are_not_taken_for_text(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        texts_of(plain(tmp_path / "a.json", content))


def test_a_first_line_may_be_longer_than_a_block(tmp_path: Path) -> None:
    assert len(texts_of(plain(tmp_path / "a.json", jsonl(["long " * 500_000, *TEXTS])))) == 1 + len(TEXTS)


def test_a_json_file_that_is_no_corpus_is_a_source_text(tmp_path: Path) -> None:
    settings_file = '{"name": "x",\n "version": 3}\n'
    assert texts_of(plain(tmp_path / "package.json", settings_file.encode())) == [settings_file]


def test_parquet_and_compression_are_known_by_their_content(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", ["x", "y"])
    assert texts_of(path.rename(tmp_path / "blob")) == ["x", "y"]
    assert texts_of(gzipped(tmp_path / "b.jsonl", jsonl(["x"])).rename(tmp_path / "b.jsonl")) == ["x"]


def test_other_columns_can_be_named_and_dots_reach_into_objects(tmp_path: Path) -> None:
    options = ReaderOptions(text_column="body.raw")
    record = json.dumps({"body": {"raw": "deep"}}).encode()
    assert texts_of(plain(tmp_path / "a.jsonl", record), options=options) == ["deep"]
    pq.write_table(pa.table({"body": [{"raw": "deep"}, {"raw": "er"}]}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", options=options) == ["deep", "er"]


def test_dictionary_and_binary_columns_are_text(tmp_path: Path) -> None:
    column = pa.array(["x", "y", "x"]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([b"x"], pa.large_binary())}), tmp_path / "b.parquet")
    assert texts_of(tmp_path / "a.parquet", tmp_path / "b.parquet") == ["x", "y", "x", "x"]


def test_chats_come_as_turns(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    line = json.dumps({"messages": turns}).encode()
    pq.write_table(pa.table({"messages": [turns]}), tmp_path / "b.parquet")
    found = list(read_documents([plain(tmp_path / "a.jsonl", line), tmp_path / "b.parquet"]))
    assert [(document.text, document.turns) for document in found] == [(None, turns)] * 2


def test_a_byte_order_mark_and_blank_lines_are_no_records(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.jsonl", b"\xef\xbb\xbf\n" + jsonl(["x"]) + b"\r\n  \n")
    assert texts_of(path) == ["x"]


def test_numbers_that_json_does_not_know_are_no_reason_to_lose_a_text(tmp_path: Path) -> None:
    assert texts_of(plain(tmp_path / "a.jsonl", b'{"text": "x", "score": NaN}\n')) == ["x"]


BAD_LINES = {
    "broken JSON": (b'{"text": "x"', r"broken JSON at its character 12"),
    "no object": (b"[1, 2]", r"no JSON object but list"),
    "missing field": (b'{"body": "x"}', r"no field text or messages \(found: body\); .*--text-column"),
    "null": (b'{"text": null}', r"field text is no text but NoneType"),
    "not UTF-8": (b'{"text": "caf\xe9"}', r"not UTF-8 at byte 29"),
    "half a surrogate pair": (rb'{"text": "\ud800"}', r"holds half of a surrogate pair"),
    "chat without roles": (b'{"messages": [{"content": "x"}]}', r"field messages is no list of turns"),
    "empty chat": (b'{"messages": []}', r"field messages is no list of turns"),
    "nested without end": (b'{"text": ' + b"[" * 200_000, r"JSON nested too deeply"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_by_its_place_or_skipped(tmp_path: Path, line: bytes, message: str) -> None:
    path = plain(tmp_path / "a.jsonl", b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl, line at byte 16: {message}"):
        texts_of(path)
    texts, problems = skipping(path)
    assert texts == ["one", "two"]
    assert len(problems) == 1


@ALL_WRITERS
def test_bytes_that_are_no_utf8_are_named_with_file_and_offset(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "latin.txt", b"caf\xe9 au lait")
    with pytest.raises(DataError, match=rf"{path.name}: not UTF-8 at byte 3"):
        texts_of(path)
    assert skipping(path)[0] == []


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_parquet_file_is_named_or_skipped(tmp_path: Path, share: float) -> None:
    good = parquet(tmp_path / "a.parquet", TEXTS)
    content = good.read_bytes()
    cut = plain(tmp_path / "b.parquet", content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"b\.parquet: no whole Parquet file"):
        texts_of(good, cut)
    texts, problems = skipping(good, cut)
    assert texts == TEXTS
    assert len(problems) == 1


def test_a_damaged_page_of_parquet_is_named_by_its_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=100, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(3).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 50] = b"\xff" * 50
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: row group 3 is damaged"):
        texts_of(path)
    texts, problems = skipping(path)
    assert texts == TEXTS[:300]
    assert len(problems) == 1


def test_a_column_that_is_missing_in_one_file_is_named_or_skipped(tmp_path: Path) -> None:
    good = parquet(tmp_path / "a.parquet", ["x"])
    pq.write_table(pa.table({"body": ["y"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: no column text or messages \(found: body\)"):
        texts_of(good, tmp_path / "b.parquet")
    assert skipping(good, tmp_path / "b.parquet")[0] == ["x"]


def test_a_column_of_another_type_and_null_rows_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column text is no text but int64"):
        texts_of(tmp_path / "a.parquet")
    path = parquet(tmp_path / "b.parquet", ["x", None, "z"])
    with pytest.raises(DataError, match=r"b\.parquet, row 1: column text is null"):
        texts_of(path)
    assert skipping(path)[0] == ["x", "z"]


@pytest.mark.parametrize("write", [gzipped, zstded])
@pytest.mark.parametrize("cut", [5, 200])
def test_a_truncated_compressed_file_is_named_or_its_beginning_kept(tmp_path: Path, write: Write, cut: int) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(TEXTS))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=rf"{path.name}: damaged or cut short after byte \d+"):
        texts_of(path)
    texts, problems = skipping(path)
    assert texts == TEXTS[: len(texts)]
    assert len(problems) == 1


def test_damage_in_a_compressed_file_costs_what_comes_after_it_and_is_one_problem(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(TEXTS * 8))[:-3000])
    decoder, whole = zlib.decompressobj(31), path.read_bytes()
    lines = decoder.decompress(whole).count(b"\n")
    texts, problems = skipping(path)
    assert lines > 3000
    assert lines - len(texts) <= 8192 // 30, "less than what a small block holds is lost"
    assert len(problems) == 1
    cut: list[DataError] = []
    items = plan_items([path], item_bytes=20_000)
    assert len(items) > 4
    assert [d.text for item in items for d in read_item(item, on_bad=cut.append)] == texts
    assert len(cut) == 1


def test_windows_of_a_compressed_file_hold_equal_parts_whatever_its_ratio(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(["the same words again and again " * 30] * 5000)))
    items = plan_items([path], item_bytes=2**20)
    sizes = [sum(len(document.text or "") for document in read_item(item)) for item in items]
    assert len(items) > 3
    assert max(sizes) < 1.3 * min(sizes)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_an_empty_compressed_file_and_a_wrong_name_are_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix}: empty, which is no"):
        texts_of(plain(tmp_path / f"a.jsonl.{suffix}", b""))
    with pytest.raises(DataError, match=rf"b\.jsonl\.{suffix}: neither gzip nor zstd"):
        texts_of(plain(tmp_path / f"b.jsonl.{suffix}", jsonl(["x"])))


def test_empty_files_hold_no_documents(tmp_path: Path) -> None:
    assert texts_of(plain(tmp_path / "a.jsonl", b""), plain(tmp_path / "b.txt", b"")) == []
    assert texts_of(parquet(tmp_path / "c.parquet", pa.array([], pa.string()))) == []


@ALL_WRITERS
def test_a_document_above_the_limit_is_named_or_skipped(tmp_path: Path, write: Write) -> None:
    options = ReaderOptions(max_document_bytes=2_000_000)
    skip = ReaderOptions(max_document_bytes=2_000_000, on_bad_document="skip")
    long = "x" * 5_000_000
    lines = write(tmp_path / "a.jsonl", jsonl(["one", long, "two"]))
    with pytest.raises(DataError, match=r"line at byte 25: longer than max_document_bytes = 2000000"):
        texts_of(lines, options=options)
    assert skipping(lines, options=skip)[0] == ["one", "two"]
    file = write(tmp_path / "b.txt", long.encode())
    with pytest.raises(DataError, match=rf"{file.name}: longer than"):
        texts_of(file, options=options)
    row = parquet(tmp_path / "c.parquet", ["one", long])
    with pytest.raises(DataError, match=r"c\.parquet, row 1: longer than"):
        texts_of(row, options=options)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.jsonl", jsonl(TEXTS))
    (item,) = plan_items([path])
    documents = read_item(item)
    next(documents)
    with path.open("ab") as file:
        file.write(jsonl(["more"]))
    with pytest.raises(DataError, match=r"a\.jsonl: changed since the build was planned"):
        list(documents)


def test_a_file_that_changes_after_planning_is_refused(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.txt", b"before")
    (item,) = plan_items([path])
    path.write_bytes(b"afterwards")
    with pytest.raises(DataError, match=r"a\.txt: changed since the build was planned"):
        list(read_item(item))
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read \(No such file"):
        list(read_item(item))


def test_the_plan_depends_on_the_files_alone(tmp_path: Path) -> None:
    inputs = [zstded(tmp_path / "a.jsonl", jsonl(TEXTS)), parquet(tmp_path / "b.parquet", TEXTS), tmp_path]
    assert plan_items(inputs) == plan_items(inputs)
    small = [item for item in plan_items(inputs[:2], item_bytes=2000) if item.path.endswith("zst")]
    assert [item.start for item in small] == [0, *(item.end for item in small[:-1])]


@pytest.mark.parametrize("option", ["text_documents", "on_bad_document"])
def test_an_unknown_choice_is_refused(option: str) -> None:
    with pytest.raises(DataError, match=rf"{option}: 'perhaps' is not one of"):
        ReaderOptions(**{option: "perhaps"})  # type: ignore[arg-type]


READ_WITHIN = """
import resource, sys
from pathlib import Path
from data_prep.readers import ReaderOptions, read_documents
import pyarrow.parquet
list(read_documents([Path(sys.argv[2])], ReaderOptions(on_bad_document="skip"), lambda problem: None))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
options = ReaderOptions(on_bad_document="skip", max_document_bytes=2**22)
problems = []
documents = sum(1 for _ in read_documents([Path(sys.argv[1])], options, problems.append))
print(documents, len(problems), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def memory_of_reading(path: Path, small: Path) -> tuple[int, int, int]:
    """Return documents, bad documents, and how many kB the reader's memory grew, measured in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", READ_WITHIN, str(path), str(small)],
        capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    documents, problems, grown = map(int, result.stdout.split())
    return documents, problems, grown


def sparse_line(path: Path, size: int) -> None:
    """A file of one line of `size` zero bytes, of which the disk holds nothing."""
    with path.open("wb") as file:
        file.write(b'{"text": "one"}\n')
        file.truncate(size)
    with path.open("ab") as file:
        file.write(b'\n{"text": "two"}\n')


def test_a_line_of_a_gigabyte_takes_no_gigabyte_of_memory(tmp_path: Path) -> None:
    sparse_line(tmp_path / "a.jsonl", 10**9)
    small = plain(tmp_path / "s.jsonl", jsonl(["x"]))
    documents, problems, kilobytes = memory_of_reading(tmp_path / "a.jsonl", small)
    assert (documents, problems) == (2, 1)
    assert kilobytes < 40_000


@pytest.mark.parametrize("write", [gzipped, zstded])
def test_memory_does_not_grow_with_a_compressed_file(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(["word " * 20_000]) * 2_000)  # 200 MB in a few hundred kB
    documents, problems, kilobytes = memory_of_reading(path, write(tmp_path / "s.jsonl", jsonl(["x"])))
    assert (documents, problems) == (2_000, 0)
    assert kilobytes < 40_000


def test_memory_does_not_grow_with_a_parquet_file_of_one_row_group(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [f"{number} " + "word " * 4_000 for number in range(8_000)], 8_000)  # 160 MB
    documents, problems, kilobytes = memory_of_reading(path, parquet(tmp_path / "s.parquet", ["x"]))
    assert (documents, problems) == (8_000, 0)
    assert kilobytes < 120_000
