"""Where text comes from: files, directories, globs, and `.list` files that name them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.errors import DataError

# What counts as text inside a directory. A file that is named itself may have any suffix.
SOURCE_SUFFIXES = frozenset(
    (
        *(".c", ".cfg", ".cpp", ".css", ".go", ".h", ".hpp", ".htm", ".html", ".ini", ".java", ".js", ".md"),
        *(".py", ".pyi", ".rs", ".rst", ".sh", ".tex", ".toml", ".ts", ".txt", ".xml", ".yaml", ".yml"),
    )
)
RECORD_SUFFIXES = frozenset((".json", ".jsonl", ".ndjson", ".parquet"))
COMPRESSED_SUFFIXES = frozenset((".gz", ".zst"))
LIST_SUFFIX = ".list"


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """Return the files that `inputs` stand for, in an order that depends on the names alone.

    A file stands for itself. A directory stands for the text files below it (see `is_corpus_file`), sorted by path;
    hidden directories and links to directories are not entered. A pattern (`*`, `?`, `[...]`, `**`) stands for what
    it matches, sorted. A file `*.list` names one of these a line, relative to its own directory or absolute.

    Raises:
        DataError: a path does not exist, or an input holds no file.
    """
    files: list[Path] = []
    for path in inputs:
        found = list(_listed(path)) if path.suffix == LIST_SUFFIX else list(_expanded(path, "--input"))
        if not found:
            raise DataError(
                f"{path}: no documents found; name files, a directory that holds some"
                f" ({', '.join(sorted(SOURCE_SUFFIXES | RECORD_SUFFIXES))}; also with"
                f" {' or '.join(sorted(COMPRESSED_SUFFIXES))}), or a {LIST_SUFFIX} file with one path a line"
            )
        files += found
    if not files:
        raise DataError("no documents: name at least one file, directory, pattern or .list file with --input")
    return files


def plain_suffix(path: Path) -> str:
    """Return the suffix of `path` in lower case, without a suffix of compression: ".jsonl" of "a.JSONL.zst"."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def is_corpus_file(path: Path) -> bool:
    """Whether a file found in a directory is taken for text."""
    return plain_suffix(path) in SOURCE_SUFFIXES | RECORD_SUFFIXES


def _expanded(path: Path, named_by: str) -> Iterator[Path]:
    if path.is_dir():
        yield from _files_below(path)
    elif path.is_file():
        yield path
    elif glob.has_magic(str(path)):
        matches = sorted(glob.iglob(str(path), recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        yield from (Path(name) for name in matches if Path(name).is_file())
    else:
        raise DataError(f"{path}: no such file or directory (from {named_by}); check the path")


def _files_below(directory: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if is_corpus_file(path) and path.is_file():
                yield path


def _listed(path: Path) -> Iterator[Path]:
    if not path.is_file():
        raise DataError(f"{path}: no such list of documents; write one path a line into it, or name a directory")
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield from _expanded(path.parent / line.strip(), f"{path}, line {number}")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot read this list ({error.strerror}); fix it or leave it out") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start} ({error.reason}); convert it") from error
