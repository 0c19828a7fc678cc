"""Directories that appear under their final name whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import DataError


def refuse_existing(out: Path) -> None:
    """Raise a DataError if `out` exists: nothing that is there is ever overwritten."""
    if out.exists() or out.is_symlink():
        raise DataError(f"{out}: already exists and is never overwritten; remove it or name another directory")


def partial_directory(out: Path) -> Path:
    """Create and return a new hidden directory beside `out`, on the same file system, to be renamed to `out`.

    Raises:
        DataError: `out` exists, or nothing can be written beside it.
    """
    refuse_existing(out)
    # Random, so that two builds of the same name never share one; not mkdtemp, whose 0700 locks a team out.
    partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise DataError(f"{out}: cannot be created ({error.strerror}); name a directory you may write to") from error
    return partial


def publish(partial: Path, out: Path) -> None:
    """Give `partial` its final name: its files reach the disk first, the name after them.

    Files in subdirectories must be on disk already.

    Raises:
        DataError: something else took the name `out` meanwhile.
    """
    for path in partial.iterdir():
        if path.is_file():
            sync_path(path)
    sync_path(partial)
    refuse_existing(out)
    partial.rename(out)
    sync_path(out.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, and stays."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


@contextmanager
def published_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `out` when the block ends, and vanishes when it raises."""
    partial = partial_directory(out)
    try:
        yield partial
        publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def published_output(out: Path) -> Iterator[Path]:
    """`published_directory` for what a person has named, and has to name anew if it does not fit.

    Raises:
        DataError: `out` exists or cannot be made, or there is no room for it.
    """
    try:
        with published_directory(out) as partial:
            yield partial
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(f"{out}: cannot be written ({error.strerror}); make room or name another directory") from error


def file_sha256(path: Path) -> str:
    """Return the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_path(path: Path) -> None:
    """Force a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
