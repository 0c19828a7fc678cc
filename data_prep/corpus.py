"""Where documents come from: files, directories of text files, and `.list` files that name them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.errors import DataError

# What counts as text inside a directory. A file that is named itself may have any suffix.
TEXT_SUFFIXES = frozenset(
    (
        *(".c", ".cfg", ".cpp", ".css", ".go", ".h", ".hpp", ".htm", ".html", ".ini", ".java", ".js", ".json", ".md"),
        *(".py", ".pyi", ".rs", ".rst", ".sh", ".tex", ".toml", ".ts", ".txt", ".xml", ".yaml", ".yml"),
    )
)
LIST_SUFFIX = ".list"


def find_documents(inputs: Sequence[Path]) -> list[Path]:
    """Return the files that `inputs` stand for, one document each, in an order that depends on the names alone.

    A file is a document. A directory stands for the text files below it (`TEXT_SUFFIXES`), sorted by path; hidden
    directories and links to directories are not entered. A file `*.list` names one file or directory a line,
    relative to its own directory or absolute.

    Raises:
        DataError: a path does not exist, or an input holds no document.
    """
    documents: list[Path] = []
    for path in inputs:
        found = list(_listed(path)) if path.suffix == LIST_SUFFIX else list(_expanded(path, "--input"))
        if not found:
            raise DataError(
                f"{path}: no documents found; name text files, a directory that holds some"
                f" ({', '.join(sorted(TEXT_SUFFIXES))}), or a {LIST_SUFFIX} file with one path a line"
            )
        documents += found
    if not documents:
        raise DataError("no documents: name at least one file, directory or .list file with --input")
    return documents


def _expanded(path: Path, named_by: str) -> Iterator[Path]:
    if path.is_dir():
        yield from _text_files(path)
    elif path.is_file():
        yield path
    else:
        raise DataError(f"{path}: no such file or directory (from {named_by}); check the path")


def _text_files(directory: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() in TEXT_SUFFIXES and path.is_file():
                yield path


def _listed(path: Path) -> Iterator[Path]:
    if not path.is_file():
        raise DataError(f"{path}: no such list of documents; write one path a line into it, or name a directory")
    for number, line in enumerate(read_document(path).splitlines(), start=1):
        if line.strip():
            yield from _expanded(path.parent / line.strip(), f"{path}, line {number}")


def read_document(path: Path) -> str:
    """Return the text of one document, its line ends and byte-order mark untouched.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot read this document ({error.strerror}); fix it or leave it out") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {error.start} ({error.reason}); convert the file (iconv -t utf-8) or leave it"
            " out of --input"
        ) from error
