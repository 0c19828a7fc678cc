"""Lines that a full disk keeps out come into the file later, whole, once and in their order."""

from __future__ import annotations

import fcntl
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.append_log import AppendLog
from monitoring.runlog import MetricsFollower, RunLog, read_events, read_metrics, read_outcome


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes; a write across the border does its first part."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def line_of(number: int, length: int = 0) -> bytes:
    return json.dumps({"step": number, "text": "x" * length}).encode() + b"\n"


@given(
    work=st.lists(st.tuples(st.integers(0, 60), st.none() | st.integers(0, 600)), max_size=30),
    at_once=st.booleans(),
)
def test_the_file_holds_whole_lines_in_order_whenever_the_disk_was_full(
    work: list[tuple[int, int | None]], at_once: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    log, lines = AppendLog(path), list[bytes]()
    for number, (length, room) in enumerate(work):
        lines.append(line_of(number, length))
        log.add(lines[-1])
        if at_once and number % 3:
            continue
        with room_for(resource.RLIM_INFINITY if room is None else room):
            log.flush()
        assert path.read_bytes() == b"".join(lines[: len(lines) - log.waiting])
        assert (log.problem is None) == (log.waiting == 0)
    log.close()
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("piece", [0, 1, 5, len(line_of(1)) - 1, len(line_of(1)), len(line_of(1)) + 3])
def test_a_piece_that_cannot_be_cut_off_is_skipped_by_readers(piece: int) -> None:
    # A file in memory can be sealed against shrinking.
    sealed = os.memfd_create("log", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    path = Path(f"/proc/self/fd/{sealed}")
    log = AppendLog(path)
    log.add(line_of(0))
    log.flush()
    for number in (1, 2):
        log.add(line_of(number))
    for room in (piece, piece + 2, piece + 4):  # the mark itself is torn too
        with room_for(len(line_of(0)) + room):
            log.flush()
        assert log.problem is not None
    log.add(line_of(3))
    log.close()
    follower = MetricsFollower(path)
    assert [record["step"] for record in follower.poll()] == [0, 1, 2, 3]
    assert follower.damaged <= 2
    os.close(sealed)


def test_of_too_many_lines_the_oldest_are_dropped(tmp_path: Path) -> None:
    log = AppendLog(tmp_path / "log.jsonl", most=3)
    with room_for(len(line_of(0)) + 4):
        for number in range(6):
            log.add(line_of(number))
            log.flush()
    log.close()
    assert (tmp_path / "log.jsonl").read_bytes() == b"".join(map(line_of, (0, 3, 4, 5)))


def test_a_run_logs_on_through_a_full_disk_and_writes_what_waited_when_there_is_room(tmp_path: Path) -> None:
    told: list[str] = []
    log = RunLog.open(tmp_path, told.append)
    log.step({"step": 1})
    with room_for(40):
        for step in (2, 3):
            log.step({"step": step})
            log.event("checkpoint_failed", step=step)
        assert (log.waiting, len(told)) == (4, 1)
        assert log.problem is not None
        assert str(tmp_path) in told[0]
        assert "File too large" in told[0]
        with pytest.raises(OSError, match="File too large"):
            log.outcome(10, "a reason that is longer than the room on the disk")
        assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    log.step({"step": 4})
    assert not log.waiting
    assert not log.problem
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert [event["step"] for event in read_events(tmp_path)] == [2, 3]
    log.outcome(0, "done")
    log.close()
    assert read_outcome(tmp_path, 1) is not None
    assert [path.name for path in log.attempt_dir.iterdir()] == ["outcome.json"]


def test_a_disk_that_stays_full_to_the_end_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    log = RunLog.open(tmp_path)
    log.event("start")
    log.step({"step": 1})
    log.close()
    assert log.waiting == 1
    assert "No space left on device" in str(log.problem)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
