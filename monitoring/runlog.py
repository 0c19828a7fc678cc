"""The run log: append-only JSON lines inside the run directory, and the readers that merge a run's attempts.

Layout (`docs/architecture.md`): `attempts/NNNN/outcome.json`, `metrics/NNNN.jsonl` (one record per optimizer step),
`events.jsonl` (one record per event, all attempts). Plain files and no database: JSON lines survive a killed writer
and need no file locks, which parallel file systems do badly.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from monitoring.append_log import AppendLog
from monitoring.reading.lines import LineReader

Record = dict[str, Any]

MOST_WAITING_STEPS = 100_000
"""Step records that wait in memory while the log cannot be written, about 1 KB each; then the oldest are dropped."""

_BYTES_AT_ONCE = 8 << 20

# JSON has no non-finite numbers; every language's number parser reads these strings.
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Listener(Protocol):
    """Who is told what a run log is told; must neither wait nor raise, and must not change it."""

    def record(self, record: Record) -> None:
        """Take the record of a step."""

    def event(self, event: Record) -> None:
        """Take an event."""


class RunLogError(ValueError):
    """A run directory that cannot be read or written; the message names it and the next action."""


class RunLog:
    """The writing end, held by rank 0 alone.

    A record that cannot be written, because the disk is full or for whatever else the system says, waits in memory for
    the next record, and training goes on. What still waits when the process ends is lost.

    Attributes:
        run_dir: the run's directory.
        attempt: number of this attempt, from 1.
        attempt_dir: `run_dir/attempts/NNNN`, for whatever else belongs to this attempt.
        listeners: told of every record and event from now on.
    """

    def __init__(
        self, run_dir: Path, attempt: int, metrics: AppendLog, events: AppendLog, on_problem: Callable[[str], None]
    ) -> None:
        self.run_dir = run_dir
        self.attempt = attempt
        self.attempt_dir = _attempt_dir(run_dir, attempt)
        self._metrics, self._events, self._on_problem = metrics, events, on_problem
        self.listeners: list[Listener] = []
        self._turn = Lock()

    @classmethod
    def open(cls, run_dir: Path, on_problem: Callable[[str], None] = lambda problem: None) -> RunLog:
        """Start the next attempt, numbered after the highest there is; files of older attempts stay untouched.

        Args:
            run_dir: the run's directory; made if it is not there.
            on_problem: told why, when records begin to wait.

        Raises:
            RunLogError: the directory cannot be written, or another process starts the same attempt.
        """
        try:
            _make(run_dir)
            events = AppendLog(_events_path(run_dir))
            _lock(events.fileno(), run_dir)
            attempt = max(attempts(run_dir), default=0) + 1
            for folder in ("attempts", "metrics"):
                (run_dir / folder).mkdir(exist_ok=True)
            _attempt_dir(run_dir, attempt).mkdir()
            metrics = AppendLog(_metrics_path(run_dir, attempt), MOST_WAITING_STEPS)
        except FileExistsError as error:
            raise RunLogError(
                f"cannot start an attempt in {run_dir}: {error.filename} is already there; if another job is starting"
                " this run, let only one of them go on, otherwise choose another run directory"
            ) from error
        except OSError as error:
            raise RunLogError(
                f"cannot start an attempt in {run_dir}: {error.strerror} ({error.filename}); choose a run directory"
                " that you can write"
            ) from error
        return cls(run_dir, attempt, metrics, events, on_problem)

    @property
    def waiting(self) -> int:
        """Number of records that are not on their way to the disk."""
        return self._metrics.waiting + self._events.waiting

    @property
    def problem(self) -> str | None:
        """Why records wait, in words; None if all is well."""
        return self._metrics.problem or self._events.problem

    def step(self, record: Record) -> None:
        """Append the record of one completed step; `attempt` is filled in.

        It is on its way to the disk when this returns, unless it waits: killing the process loses nothing.
        """
        assert isinstance(record["step"], int), record
        record = record | {"attempt": self.attempt}
        self._append(self._metrics, record)
        for listener in self.listeners:
            listener.record(record)

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event with the time (unix seconds) and this attempt's number."""
        assert not fields.keys() & {"time", "attempt"}, fields
        event = {"time": time.time(), "attempt": self.attempt, "kind": kind} | fields
        self._append(self._events, event)
        for listener in self.listeners:
            listener.event(event)

    def outcome(self, exit_code: int, reason: str, **fields: Any) -> None:
        """Write how this attempt ended; an attempt without an outcome was killed or still runs.

        Raises:
            OSError: it cannot be written.
        """
        record = {"exit_code": exit_code, "reason": reason, "time": time.time(), "attempt": self.attempt} | fields
        write_atomic(self.attempt_dir / "outcome.json", _encode(record))

    def close(self) -> None:
        """Bring everything to the disk, as far as that works, and close the files."""
        with self._turn:
            self._metrics.close()
            self._events.close()

    def _append(self, log: AppendLog, record: Record) -> None:
        line = _encode(record) + b"\n"
        with self._turn:
            before = self.problem
            log.add(line)
            self._metrics.flush()
            self._events.flush()
        if before is None and self.problem is not None:
            self._on_problem(self.problem)


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Keep other processes from writing to a run within the block, without starting an attempt.

    Nothing is held where nothing was ever logged, or where the file system has no locks.

    Raises:
        RunLogError: there is no such run, or a job is at work on it.
        OSError: its events cannot be opened for writing.
    """
    _require(run_dir)
    if not _events_path(run_dir).exists():
        yield
        return
    events = os.open(_events_path(run_dir), os.O_RDWR)  # NFS locks for writing only what is open for writing
    try:
        _lock(events, run_dir)
        yield
    finally:
        os.close(events)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file that is complete whenever it is there: a reader sees the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{time.time_ns()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_path(path: Path) -> None:
    """Force a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class JsonlFollower:
    """Reads an append-only file of JSON lines as it grows.

    A last line without its newline is not complete: it is left for a later poll. A complete line that is not an
    object with the required field is skipped and counted; so is one of over a megabyte.

    Attributes:
        path: the file; it may not exist yet.
        damaged: number of lines skipped so far.
    """

    def __init__(self, path: Path, required: str, kind: type) -> None:
        self.path = path
        self.damaged = 0
        self._required = required
        self._kind = kind
        self._reader = LineReader(path)

    @property
    def too_long(self) -> int:
        """Number of lines skipped for their length."""
        return self._reader.too_long

    @property
    def problem(self) -> str | None:
        """Why the file could not be read the last time, None if it could or is not there."""
        return self._reader.problem

    def poll(self) -> list[Record]:
        """Return the records completed since the last poll, in file order."""
        records: list[Record] = []
        before = -1
        while self._reader.offset != before:
            before = self._reader.offset
            for line in self._reader.read(_BYTES_AT_ONCE):
                record = _decode(line)
                if record is not None and isinstance(record.get(self._required), self._kind):
                    records.append(record)
                elif line.strip():
                    self.damaged += 1
        return records


class MetricsFollower(JsonlFollower):
    """Reads one attempt's step records (`metrics/NNNN.jsonl`) as they are written, for progress displays."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "step", int)


class EventsFollower(JsonlFollower):
    """Reads a run's events (`events.jsonl`) as they are written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "kind", str)


def attempts(run_dir: Path) -> list[int]:
    """Return the numbers of all attempts, ascending."""
    _require(run_dir)
    names = [path.name for path in (run_dir / "attempts").glob("*")]
    names += [path.stem for path in (run_dir / "metrics").glob("*.jsonl")]
    return sorted({int(name) for name in names if name.isdecimal()})


def read_attempt(run_dir: Path, attempt: int) -> list[Record]:
    """Return one attempt's step records as written; none if it logged nothing."""
    _require(run_dir)
    return _read_attempt(run_dir, attempt)[0]


def read_metrics(run_dir: Path) -> list[Record]:
    """Return one record per step, the newest attempt's, sorted by step.

    It holds every step that any attempt reached; `monitoring.reading.run_table` tells which of them the run stands on.
    """
    newest = {record["step"]: record for attempt in attempts(run_dir) for record in read_attempt(run_dir, attempt)}
    return [newest[step] for step in sorted(newest)]


def replayed(run_dir: Path) -> list[tuple[Record, Record]]:
    """Return (older, newer) records of steps that more than one attempt logged, sorted by step.

    A step logged by three attempts gives two pairs: first and second, second and third.
    """
    versions: dict[int, dict[int, Record]] = {}
    for attempt in attempts(run_dir):
        for record in read_attempt(run_dir, attempt):
            versions.setdefault(record["step"], {})[attempt] = record
    return [pair for step in sorted(versions) for pair in pairwise(versions[step].values())]


def read_events(run_dir: Path) -> list[Record]:
    """Return the events of all attempts in the order written."""
    _require(run_dir)
    return EventsFollower(_events_path(run_dir)).poll()


def read_outcome(run_dir: Path, attempt: int) -> Record | None:
    """Return what the attempt's `outcome.json` says, or None if it left none that can be read."""
    _require(run_dir)
    try:
        return _decode((_attempt_dir(run_dir, attempt) / "outcome.json").read_bytes())
    except OSError:
        return None


def _make(run_dir: Path) -> None:
    """Make the directory such that a power cut does not take it away again, with all that was brought to the disk."""
    new = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync_path(path.parent)


def _require(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise RunLogError(f"no run directory {run_dir}: name the directory that `rookery train` wrote (run_dir=...)")


def _attempt_dir(run_dir: Path, attempt: int) -> Path:
    return run_dir / "attempts" / f"{attempt:04d}"


def _metrics_path(run_dir: Path, attempt: int) -> Path:
    return run_dir / "metrics" / f"{attempt:04d}.jsonl"


def _events_path(run_dir: Path) -> Path:
    return run_dir / "events.jsonl"


def _read_attempt(run_dir: Path, attempt: int) -> tuple[list[Record], int]:
    follower = MetricsFollower(_metrics_path(run_dir, attempt))
    records = follower.poll()
    for record in records:
        record["attempt"] = attempt
    return records, follower.damaged


def _lock(events: int, run_dir: Path) -> None:
    """Hold the run while the file is open here, however this ends; a file system without locks holds nothing."""
    try:
        fcntl.flock(events, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunLogError(
            f"another job is at work on {run_dir} (attempt {max(attempts(run_dir), default=1)}); wait until it ends,"
            " or choose another run directory"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def _encode(record: Record) -> bytes:
    try:
        text = json.dumps(record, allow_nan=False, separators=(",", ":"))
    except ValueError:  # rare: a value is not finite
        text = json.dumps(_spell_non_finite(record), allow_nan=False, separators=(",", ":"))
    return text.encode()


def _spell_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # "nan", "inf" or "-inf"
    if isinstance(value, dict):
        return {key: _spell_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spell_non_finite(item) for item in value]
    return value


def _decode(text: bytes) -> Record | None:
    """Return the object that the text holds, or None if it holds none."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    if b'"nan"' in text or b'inf"' in text:
        return {key: _read_non_finite(value) for key, value in record.items()}
    return record


def _read_non_finite(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _read_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read_non_finite(item) for item in value]
    return value
