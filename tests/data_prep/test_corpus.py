from pathlib import Path

import pytest

from data_prep.corpus import find_documents, read_document
from data_prep.errors import DataError


def write(path: Path, content: bytes = b"text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_directory_stands_for_its_text_files_in_sorted_order(tmp_path: Path) -> None:
    expected = [write(tmp_path / name) for name in ("b.md", "z.PY", "a/c.txt", "a/d/e.h")]
    for name in ("image.png", "program", ".hidden/x.txt", "a/.git/y.txt"):
        write(tmp_path / name)
    assert find_documents([tmp_path]) == expected


def test_files_and_directories_keep_the_order_in_which_they_were_named(tmp_path: Path) -> None:
    late, early = write(tmp_path / "1/z.txt"), write(tmp_path / "2/a.any")
    assert find_documents([late, early]) == [late, early]
    assert find_documents([early, tmp_path / "1"]) == [early, late]


def test_a_list_names_paths_relative_to_itself_or_absolute(tmp_path: Path) -> None:
    inside, outside = write(tmp_path / "lists/deep/a.py"), write(tmp_path / "elsewhere/b.odd")
    manifest = write(tmp_path / "lists/train.list", f"deep\n\n{outside}\n../elsewhere/b.odd\n".encode())
    found = find_documents([manifest])
    assert [path.resolve() for path in found] == [inside, outside, outside]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/x\.txt: no such file"):
        find_documents([tmp_path / "nowhere/x.txt"])


def test_a_missing_path_in_a_list_is_named_with_its_line(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    manifest = write(tmp_path / "c.list", b"a.txt\ngone.txt\n")
    with pytest.raises(DataError, match=r"gone\.txt: no such .*c\.list, line 2"):
        find_documents([manifest])


@pytest.mark.parametrize("empty", ["directory", "empty.list"])
def test_an_input_without_documents_is_refused(tmp_path: Path, empty: str) -> None:
    write(tmp_path / "directory/photo.png")
    write(tmp_path / "empty.list", b"\n")
    with pytest.raises(DataError, match=f"{empty}: no documents"):
        find_documents([tmp_path / empty])


def test_no_input_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="--input"):
        find_documents([])


def test_a_document_is_read_without_any_change(tmp_path: Path) -> None:
    text = "\ufeffone\r\ntwo\x00\u00e9\n"
    assert read_document(write(tmp_path / "a.txt", text.encode())) == text


def test_bytes_that_are_no_utf8_are_named_with_file_and_offset(tmp_path: Path) -> None:
    path = write(tmp_path / "latin.txt", b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 at byte 3"):
        read_document(path)
