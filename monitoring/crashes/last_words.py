"""What the output of ranks and of their launcher says of how they ended: srun, MPICH, Open MPI, PALS, torchrun."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LONGEST_LINE = 2000
_LABEL = re.compile(r"^\s*\[?(\d+)[\]:] ?")
# In each line that `deaths` reads: thousands of others lie between them.
_HINT = re.compile(
    r"srun: error|oom[-_ ]kill|ode failure|CANCELLED AT|(?:on|from) signal|with code|MPI_Abort|exitcode|RUNNING|EXIT S"
)
_FATAL = "Fatal Python error: "
_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION = re.compile(r"^((?:\w+\.)*(?:[A-Z]\w*|error))(?:: (.*))?$")
_STACK_LINES = 400

# The words of strsignal(3) and of Python's faulthandler.
_SIGNALS = {
    "Killed": "SIGKILL",
    "Terminated": "SIGTERM",
    "Segmentation fault": "SIGSEGV",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Floating point exception": "SIGFPE",
    "Floating-point exception": "SIGFPE",
    "Illegal instruction": "SIGILL",
}


@dataclass(frozen=True, kw_only=True)
class Death:
    """One announcement that something ended.

    Attributes:
        kind: "signal", "memory", "exit", "node" or "cancelled".
        detail: name of the signal, exit code, or why the queue cancelled it.
        rank: of the process, None if it is not said.
        pid: likewise.
        host: as the launcher calls it, None if it is not said.
        line: the words.
    """

    kind: str
    detail: str
    line: str
    rank: int | None = None
    pid: int | None = None
    host: str | None = None


def tail(path: Path, most_bytes: int) -> list[str]:
    """Return the last lines of a file, from its last `most_bytes`; long ones are cut, a missing file has none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - most_bytes))
            lines = file.read(most_bytes).decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    # Progress displays rewrite their line with carriage returns, at which splitlines() has cut.
    return [line[:_LONGEST_LINE] for line in lines[1 if size > most_bytes else 0 :]]


def of_rank(lines: Sequence[str], rank: int | None) -> list[str]:
    """Return the lines of a rank without their labels (`3: ...`, `[3] ...`) if most have one, else all lines."""
    labels = [_LABEL.match(line) for line in lines]
    labelled = sum(label is not None for label in labels)
    if rank is None or labelled * 2 <= len(lines):
        return list(lines)
    pairs = zip(lines, labels, strict=True)
    return [line[label.end() :] for line, label in pairs if label is not None and int(label.group(1)) == rank]


def deaths(lines: Sequence[str]) -> list[Death]:
    """Return the announcements among the lines, in order."""
    found: list[Death] = []
    pid: int | None = None
    for line in filter(_HINT.search, lines):
        if match := re.search(r"=\s+PID (\d+) RUNNING AT (\S+)", line):  # MPICH: the signal comes lines later
            pid = int(match.group(1))
        elif match := re.search(r"EXIT STRING: .*\(signal (\d+)\)", line):
            found.append(_signal(int(match.group(1)), line, pid=pid))
        else:
            found += [
                death for pattern, read in _PATTERNS if (match := pattern.search(line)) and (death := read(match))
            ]
    return found


def signal_name(number: int) -> str:
    """Return SIGKILL for 9, ..."""
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def fatal_error(lines: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the signal and the stacks that Python's faulthandler left among the lines last, None if it did not."""
    place = _last(lines, _FATAL)
    if place is None:
        return None
    words = lines[place].partition(_FATAL)[2].strip()
    rest = [
        index for index in range(place, len(lines)) if lines[index].partition(": ")[0].endswith("Extension modules")
    ]
    end = rest[0] if rest else place + _STACK_LINES
    return _SIGNALS.get(words, words), list(lines[place : min(end, place + _STACK_LINES)])


def exception(lines: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """Return kind, message and lines of the last traceback among the lines, None if there is none."""
    place = _last(lines, _TRACEBACK)
    if place is None:
        return None
    for end in range(place + 1, len(lines)):
        match = _EXCEPTION.match(lines[end])
        if match is not None:
            return match.group(1).rpartition(".")[2], (match.group(2) or "").strip(), list(lines[place : end + 1])
    return None


def _last(lines: Sequence[str], words: str) -> int | None:
    return next((index for index in reversed(range(len(lines))) if words in lines[index]), None)


def _signal(number: int, line: str, **who: int | str | None) -> Death:
    return Death(kind="signal", detail=signal_name(number), line=line.strip(), **who)  # type: ignore[arg-type]


def _srun(match: re.Match[str]) -> Death | None:
    """`srun: error: n2: task 3: Killed`, `srun: error: n1: tasks 0-3: Exited with exit code 1`."""
    host, rank, words = match.group(1), int(match.group(2)), match.group(3)
    if words.startswith("Out Of Memory"):
        return Death(kind="memory", detail="", line=match.string.strip(), rank=rank, host=host)
    if code := re.match(r"Exited with exit code (\d+)", words):
        return Death(kind="exit", detail=code.group(1), line=match.string.strip(), rank=rank, host=host)
    name = next((name for said, name in _SIGNALS.items() if words.startswith(said)), None)
    return None if name is None else Death(kind="signal", detail=name, line=match.string.strip(), rank=rank, host=host)


def _torchrun(match: re.Match[str]) -> Death:
    code, pid = int(match.group(1)), int(match.group(2))
    if code < 0:
        return _signal(-code, match.string, pid=pid)
    return Death(kind="exit", detail=str(code), line=match.string.strip(), pid=pid)


_PATTERNS: Sequence[tuple[re.Pattern[str], Callable[[re.Match[str]], Death | None]]] = (
    (re.compile(r"srun: error: (\S+): tasks? (\d+)[\d,-]*: (.+)"), _srun),
    (
        re.compile(r"Detected \d+ oom[-_ ]kill event"),
        lambda match: Death(kind="memory", detail="", line=match.string.strip()),
    ),
    (
        re.compile(r"[Nn]ode failure on (\S+)"),
        lambda match: Death(kind="node", detail="", line=match.string.strip(), host=match.group(1).rstrip(".,")),
    ),
    (
        re.compile(r" ON (\S+) CANCELLED AT .* DUE TO NODE FAILURE"),
        lambda match: Death(kind="node", detail="", line=match.string.strip()),
    ),
    (
        re.compile(r"CANCELLED AT .* DUE TO ((?!NODE FAILURE)[A-Z ]+[A-Z])"),
        lambda match: Death(kind="cancelled", detail=match.group(1).lower(), line=match.string.strip()),
    ),
    (
        re.compile(r"process rank (\d+) with PID \d+ on node (\S+) exited on signal (\d+)"),  # Open MPI
        lambda match: _signal(int(match.group(3)), match.string, rank=int(match.group(1)), host=match.group(2)),
    ),
    (
        re.compile(r"(\S+): rank (\d+) died from signal (\d+)"),  # PALS
        lambda match: _signal(int(match.group(3)), match.string, rank=int(match.group(2)), host=match.group(1)),
    ),
    (
        re.compile(r"(\S+): rank (\d+) exited with code (\d+)"),
        lambda match: Death(
            kind="exit", detail=match.group(3), line=match.string.strip(), rank=int(match.group(2)), host=match.group(1)
        ),
    ),
    (
        re.compile(r"application called MPI_Abort\(\S+ (\d+)\) - process (\d+)"),
        lambda match: Death(kind="exit", detail=match.group(1), line=match.string.strip(), rank=int(match.group(2))),
    ),
    (re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: \d+ \(pid: (\d+)\)"), _torchrun),
)
