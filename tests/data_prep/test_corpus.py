from pathlib import Path

import pytest

from data_prep.corpus import find_files
from data_prep.errors import DataError


def write(path: Path, content: bytes = b"text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_directory_stands_for_its_text_files_in_sorted_order(tmp_path: Path) -> None:
    names = ("b.md", "c.parquet", "d.jsonl.zst", "e.txt.gz", "z.PY", "a/c.txt", "a/d/e.h")
    expected = [write(tmp_path / name) for name in names]
    for name in ("image.png", "program", "x.tar.gz", ".hidden/x.txt", "a/.git/y.txt"):
        write(tmp_path / name)
    assert find_files([tmp_path]) == expected


def test_files_and_directories_keep_the_order_in_which_they_were_named(tmp_path: Path) -> None:
    late, early = write(tmp_path / "1/z.txt"), write(tmp_path / "2/a.any")
    assert find_files([late, early]) == [late, early]
    assert find_files([early, tmp_path / "1"]) == [early, late]


def test_a_pattern_stands_for_the_files_that_it_matches(tmp_path: Path) -> None:
    first, second, third = (write(tmp_path / name) for name in ("a1.x", "a2.x", "deep/er/a3.x"))
    (tmp_path / "a3.x").mkdir()
    assert find_files([tmp_path / "a?.x"]) == [first, second]
    assert find_files([tmp_path / "**/a*.x"]) == [first, second, third]
    with pytest.raises(DataError, match=r"b\*: no documents found"):
        find_files([tmp_path / "b*"])


def test_a_name_that_looks_like_a_pattern_is_a_name_if_there_is_such_a_file(tmp_path: Path) -> None:
    assert find_files([write(tmp_path / "a[1].txt")]) == [tmp_path / "a[1].txt"]


def test_a_list_names_paths_relative_to_itself_or_absolute(tmp_path: Path) -> None:
    inside, outside = write(tmp_path / "lists/deep/a.py"), write(tmp_path / "elsewhere/b.odd")
    manifest = write(tmp_path / "lists/train.list", f"deep\n\n{outside}\n../elsewhere/*.odd\n".encode())
    found = find_files([manifest])
    assert [path.resolve() for path in found] == [inside, outside, outside]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/x\.txt: no such file"):
        find_files([tmp_path / "nowhere/x.txt"])


def test_a_missing_path_in_a_list_is_named_with_its_line(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    manifest = write(tmp_path / "c.list", b"a.txt\ngone.txt\n")
    with pytest.raises(DataError, match=r"gone\.txt: no such .*c\.list, line 2"):
        find_files([manifest])


def test_a_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"c\.list: not UTF-8 at byte 3"):
        find_files([write(tmp_path / "c.list", b"caf\xe9\n")])


@pytest.mark.parametrize("empty", ["directory", "empty.list"])
def test_an_input_without_documents_is_refused(tmp_path: Path, empty: str) -> None:
    write(tmp_path / "directory/photo.png")
    write(tmp_path / "empty.list", b"\n")
    with pytest.raises(DataError, match=f"{empty}: no documents"):
        find_files([tmp_path / empty])


def test_no_input_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="--input"):
        find_files([])
