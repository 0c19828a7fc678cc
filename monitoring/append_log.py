"""A file of lines that only grows, and that outlives a full disk: what cannot be written now waits in memory."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from io import FileIO
from itertools import islice
from pathlib import Path

_LINES_AT_ONCE = 256
_TORN = b" torn\n"  # makes any piece of a JSON line a damaged line: even one that lacks nothing but its end


class AppendLog:
    """The writing end, held by one process.

    Every line, or several that waited, is one system call, so that a killed writer leaves whole lines. A disk that
    fills up or fails in mid-line leaves a piece: it is cut off, or else ended as a damaged line, and the line is
    written again as a whole.

    Args:
        path: the file; made if it is not there.
        most: number of lines that wait at most, the oldest are dropped first; None for no limit.

    Attributes:
        problem: why lines wait, in words; None if all is well.

    Raises:
        OSError: the file cannot be opened, or a torn line at its end not be ended.
    """

    def __init__(self, path: Path, most: int | None = None) -> None:
        self.problem: str | None = None
        self._path = path
        self._file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666), "ab")
        self._waiting: deque[bytes] = deque(maxlen=most)
        self._length = os.fstat(self.fileno()).st_size  # of the whole lines
        self._torn = 0  # bytes behind them that are none
        if self._length and os.pread(self.fileno(), 1, self._length - 1) != b"\n":
            # End a line that a dying node left torn, or the next would be lost with it.
            self._length += self._file.write(b"\n")

    def fileno(self) -> int:
        """Return the descriptor, for locks."""
        return self._file.fileno()

    @property
    def waiting(self) -> int:
        """Number of lines that are not in the file."""
        return len(self._waiting)

    def add(self, line: bytes) -> None:
        """Let a line, which ends with its only newline, wait for the next `flush`."""
        self._waiting.append(line)

    def flush(self) -> None:
        """Write the lines that wait, in order, as far as that works."""
        try:
            while self._waiting:
                self._write()
            self.problem = None
        except OSError as error:
            self.problem = f"{self._path}: {error.strerror or error}"
            self._cut()

    def close(self) -> None:
        """Write what waits and bring the file to the disk, as far as that works, and close it."""
        if self._file.closed:
            return
        self.flush()
        try:
            os.fsync(self.fileno())
        except OSError as error:
            self.problem = self.problem or f"{self._path}: {error.strerror or error}"
        with suppress(OSError):
            self._file.close()

    def _write(self) -> None:
        marker = _TORN if self._torn else b""
        content = marker + b"".join(islice(self._waiting, _LINES_AT_ONCE))
        written = 0
        try:
            while written < len(content):  # a disk with room for a part says why only when asked for the rest
                written += self._file.write(content[written:])
        finally:
            self._settle(content[:written], marker)

    def _settle(self, written: bytes, marker: bytes) -> None:
        """Let go of the lines that are in the file now, and remember the piece of one behind them."""
        whole = written.rfind(b"\n") + 1
        if whole:
            self._length, self._torn = self._length + self._torn + whole, 0
            for _ in range(written.count(b"\n") - bool(marker)):
                self._waiting.popleft()
        self._torn += len(written) - whole

    def _cut(self) -> None:
        """Cut off the piece that a failed write has left; what is not known to be such a piece is only ended later."""
        with suppress(OSError):
            behind = os.fstat(self.fileno()).st_size - self._length
            if self._torn and behind == self._torn:
                os.ftruncate(self.fileno(), self._length)
                behind = 0
            self._torn = behind
