"""The hidden directory beside a dataset in which it is built: what is finished in it survives any end of a build.

    .NAME.partial/settings.json    what the build makes; another build may not continue it
    .NAME.partial/units/00012.json a finished unit, written after its parts have reached the disk
    .NAME.partial/data/part-00012  parts; `data` becomes NAME when all units are finished
    .NAME.partial/duplicates/00012 which of a unit's documents, or lines, are in the corpus before, if that is asked for
    .NAME.partial/locks            byte i is locked by the process that works on unit i

A lock ends with its process, however that ends, so that nothing has to be cleaned up before a build can go on.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.errors import DataError
from data_prep.files import publish, refuse_existing, write_atomic

_PUBLISHING = 2**40  # the byte that is locked by the process that publishes
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_SECONDS_UNTIL_KILLED_RANKS_ARE_GONE = 15.0
_SECONDS_BETWEEN_TRIES = 0.2


class Workspace:
    """The directory of one unfinished build.

    Attributes:
        out: what the dataset will be called.
        root: the hidden directory.
        data: where parts are written; it becomes `out`.
        has_locks: whether the file system knows locks, as far as has been seen.
    """

    def __init__(self, out: Path) -> None:
        """Refer to the workspace of `out`; nothing is made or looked at."""
        self.out = out
        self.root = out.parent / f".{out.name}.partial"
        self.data = self.root / "data"
        self._units, self._flags = self.root / "units", self.root / "duplicates"
        self.has_locks = True
        self._is_new = False
        self._locks: int | None = None

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """Make the workspace, or check that the one that is there was begun with the same settings.

        Raises:
            DataError: `out` exists, other settings, or nothing can be written here.
        """
        refuse_existing(self.out)
        path = self.root / "settings.json"
        with self.writing():
            for directory in (self.data, self._units):
                directory.mkdir(parents=True, exist_ok=True)
            self._is_new = not path.exists()
            if self._is_new:
                write_atomic(path, json.dumps(settings, indent=1).encode() + b"\n")
        begun = _read_json(path)
        differing = [name for name in {**settings, **begun} if settings.get(name) != begun.get(name)]
        if differing:
            what = ", ".join(_difference(name, begun.get(name), settings.get(name)) for name in differing)
            raise DataError(
                f"{self.root}: holds an unfinished build with other settings ({what}); repeat those, or remove that"
                " directory to start afresh"
            )

    def sweep(self) -> None:
        """Remove what killed processes have left half written, once none of them is alive any more.

        Raises:
            DataError: another build is at work here.
        """
        deadline = time.monotonic() + _SECONDS_UNTIL_KILLED_RANKS_ARE_GONE
        while not self._lock(0, _PUBLISHING):
            if time.monotonic() > deadline:
                raise DataError(f"{self.root}: another build is at work here; wait for it, or name another --out")
            time.sleep(_SECONDS_BETWEEN_TRIES)
        try:
            for path in self.data.glob(".*.partial"):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            self._unlock(0, _PUBLISHING)

    @contextmanager
    def claim(self, unit: int) -> Iterator[bool]:
        """Yield whether this process may work on unit `unit`; while the block lasts, no other may."""
        claimed = self._lock(unit, 1)
        try:
            yield claimed
        finally:
            if claimed:
                self._unlock(unit, 1)

    def finished_units(self) -> list[int]:
        """Return the indices of all units with a record, ascending; of no use if inputs have changed, see `record`."""
        return sorted(int(path.stem) for path in self._units.glob("*.json"))

    def record(self, unit: int) -> dict[str, Any] | None:
        """Return the record of a finished unit, None if there is none."""
        path = self._record_path(unit)
        return _read_json(path) if path.exists() else None

    def finish_unit(self, unit: int, record: Mapping[str, Any]) -> None:
        """Keep the record of a unit whose parts are on disk."""
        write_atomic(self._record_path(unit), json.dumps(record).encode() + b"\n")

    def forget_unit(self, unit: int) -> None:
        """Drop a record that no longer holds, before its parts are written anew."""
        self._record_path(unit).unlink(missing_ok=True)

    def keep_flags(self, unit: int, flags: npt.NDArray[np.bool_]) -> None:
        """Keep the duplicates of a unit."""
        with self.writing():
            self._flags.mkdir(exist_ok=True)
            write_atomic(self._flags / f"{unit:05d}", zlib.compress(flags.tobytes(), level=1))

    def flags(self, unit: int) -> npt.NDArray[np.bool_]:
        """Return the duplicates of a unit."""
        return np.frombuffer(zlib.decompress((self._flags / f"{unit:05d}").read_bytes()), np.bool_)

    def finish_flags(self, corpus: str) -> None:
        """Note that the flags of all units are there, for the corpus of this digest."""
        with self.writing():
            self._flags.mkdir(exist_ok=True)
            write_atomic(self._flags / "corpus", corpus.encode())

    def has_flags(self, corpus: str) -> bool:
        """Whether the flags of all units are there, for the corpus of this digest."""
        path = self._flags / "corpus"
        return path.exists() and path.read_text(encoding="utf-8") == corpus

    def forget_part(self, name: str) -> None:
        """Drop a part that no record vouches for."""
        shutil.rmtree(self.data / name, ignore_errors=True)

    def publish(self, files: Mapping[str, bytes], parts: set[str]) -> bool:
        """Add `files` to the data, drop what is neither these nor `parts`, and give the whole its name.

        Returns:
            Whether this process did it, and no other had done it before.

        Raises:
            DataError: something else has taken the name, or nothing can be written here.
        """
        self._lock(_PUBLISHING, 1, wait=True)
        try:
            if not self.data.exists():
                return False
            refuse_existing(self.out)
            with self.writing():
                for path in self.data.iterdir():
                    if path.name not in parts:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                for name, content in files.items():
                    (self.data / name).parent.mkdir(exist_ok=True)
                    write_atomic(self.data / name, content)
                publish(self.data, self.out)
            return True
        finally:
            self._unlock(_PUBLISHING, 1)

    def discard(self) -> None:
        """Remove the workspace if this process has made it, nobody else works in it, and nothing in it is of use."""
        if self._is_new and not self._flags.exists() and self._lock(0, _PUBLISHING):
            self.remove()

    def remove(self) -> None:
        """Remove the workspace and all that is in it."""
        shutil.rmtree(self.root, ignore_errors=True)

    def close(self) -> None:
        """Give up every lock."""
        if self._locks is not None:
            os.close(self._locks)
            self._locks = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn the system's refusal to write, such as a full disk, into a DataError."""
        try:
            yield
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            action = "make room" if is_full else "make it writable, or name another --out,"
            raise DataError(
                f"{error.filename or self.root}: cannot be written ({error.strerror or error}); {action} and start the"
                " same command again"
            ) from error

    def _record_path(self, unit: int) -> Path:
        return self._units / f"{unit:05d}.json"

    def _lock(self, start: int, length: int, *, wait: bool = False) -> bool:
        """Lock bytes of the lock file; True as well where the file system knows no locks."""
        with self.writing():
            if self._locks is None:
                self._locks = os.open(self.root / "locks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _NO_LOCKS:
                raise
            self.has_locks = False
        return True

    def _unlock(self, start: int, length: int) -> None:
        if self._locks is not None:
            try:
                fcntl.lockf(self._locks, fcntl.LOCK_UN, length, start)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise


def _difference(name: str, then: object, now: object) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        return ", ".join(_difference(f"{name}.{key}", then.get(key), now.get(key)) for key in keys)
    return f"{name} was {then!r}, now {now!r}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove {path.parent} to start afresh") from error
    assert isinstance(value, dict)
    return value
