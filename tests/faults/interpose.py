"""Faults of the file system for this process: the library `interpose.c`, which must have been preloaded into it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path

SOURCE = Path(__file__).with_name("interpose.c")
ALWAYS = 2**62


class Operation(IntFlag):
    """Calls that change a file system. To write over what a file holds is WRITE; to open a file that is, is none."""

    WRITE = 1
    SYNC = 2
    RENAME = 4
    MKDIR = 8
    UNLINK = 16
    RMDIR = 32
    CREATE = 64
    TRUNCATE = 128


ANY = Operation(255)


class Action(IntEnum):
    """What happens at the chosen call."""

    KILL_BEFORE = 0
    """The process is killed before the call."""
    KILL_WITHIN = 1
    """The process is killed when a write is half done, or any other call is done and has not returned."""
    FAIL = 2
    """Calls fail."""
    FULL = 3
    """Writes fail when no room is left, the last one after a short write."""
    RECORD = 4
    """Nothing; calls that succeed are written down."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault, and where it strikes.

    Attributes:
        pattern: extended glob of the absolute paths that are watched, in which * matches "/" too: "/run?(/*)".
        action: what happens.
        first: the number, from 1, of the call at which it happens; counted are the watched operations of this process.
        operations: which calls are counted, and can fail.
        error: errno with which calls fail.
        calls: number of calls that fail.
        room: bytes that can be written before the disk is full.
        log: the file that records.
    """

    pattern: str
    action: Action
    first: int = 1
    operations: Operation = ANY
    error: int = 0
    calls: int = ALWAYS
    room: int = 0
    log: Path | None = None

    def arm(self) -> None:
        """Let it strike in this process, in the place of any other fault. The count of calls begins anew."""
        log = -1 if self.log is None else os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        _library().fault_arm(
            ctypes.byref(
                _Fault(
                    os.fsencode(self.pattern),
                    self.action,
                    self.operations,
                    self.error,
                    log,
                    self.first,
                    self.calls,
                    self.room,
                )
            )
        )


class _Fault(ctypes.Structure):
    _fields_ = (
        ("pattern", ctypes.c_char * 4096),
        ("action", ctypes.c_int),
        ("operations", ctypes.c_int),
        ("error", ctypes.c_int),
        ("log", ctypes.c_int),
        ("first", ctypes.c_long),
        ("calls", ctypes.c_long),
        ("room", ctypes.c_long),
    )


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    assert hasattr(library, "fault_arm"), "this process was started without the library"
    return library


def build(directory: Path) -> Path | None:
    """Compile the library into `directory` and return it; None without a compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang", "g++"))), None)
    if compiler is None:
        return None
    library = directory / "interpose.so"
    flags = ["-x", "c", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    return library
