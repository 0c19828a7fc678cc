"""Disks that are full, over quota, broken or not writable: training goes on, and the last good checkpoint stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from monitoring.runlog import read_attempt, read_events, read_metrics, read_outcome
from pipeline.checkpoints.manifest import checkpoint_name
from pipeline.checkpoints.reader import newest_valid, resolve_checkpoint
from tests.faults.fork_server import ForkServer, fault_server
from tests.faults.interpose import ALWAYS, Action, Fault, Operation
from tests.faults.saves import check_content, save

STEPS = list(range(1, 13))  # of tests/pipeline/conftest.py, with a save after every fourth


@pytest.fixture(scope="module")
def server() -> ForkServer:
    return fault_server()


def full(pattern: str, error: int, room: int = 0) -> Fault:
    return Fault(pattern=pattern, action=Action.FULL, error=error, room=room)


def failing(pattern: str, error: int, operations: Operation, *, first: int = 1, calls: int = ALWAYS) -> Fault:
    return Fault(pattern=pattern, action=Action.FAIL, error=error, operations=operations, first=first, calls=calls)


def events(run_dir: Path, kind: str, *fields: str) -> list[tuple[Any, ...]]:
    return [tuple(event[name] for name in fields) for event in read_events(run_dir) if event["kind"] == kind]


@pytest.mark.parametrize(
    ("faults", "failures"),
    [
        (  # a disk that fills up in the middle of a file, and a quota that ends in the manifest
            {
                1: full("*step-00000004*", errno.ENOSPC, 100_000),
                0: full("*step-00000012*/manifest.json", errno.EDQUOT, 50),
            },
            {4: (1, errno.ENOSPC), 12: (0, errno.EDQUOT)},
        ),
        (  # a disk that breaks, and a directory that nobody may write any more
            {
                1: failing("*step-00000004*", errno.EIO, Operation.SYNC),
                0: failing("*step-00000012*", errno.EACCES, Operation.MKDIR),
            },
            {4: (1, errno.EIO), 12: (0, errno.EACCES)},
        ),
        (  # at the very end of a save
            {0: failing("*step-000000@(04|12)", errno.EACCES, Operation.RENAME)},
            {4: (0, errno.EACCES), 12: (0, errno.EACCES)},
        ),
    ],
    ids=["full", "broken", "not renamed"],
)
def test_a_save_that_fails_is_an_alarm_and_the_last_one_exit_10(
    faults: dict[int, Fault], failures: dict[int, tuple[int, int]], server: ForkServer, workdir: Path
) -> None:
    run_dir = workdir / "run"
    assert server.train(workdir, "test.yaml", faults=faults) == [10, 10]
    assert [record["step"] for record in read_metrics(run_dir)] == STEPS
    said = events(run_dir, "checkpoint_failed", "step", "rank", "reason")
    assert {step: rank for step, rank, _ in said} == {step: rank for step, (rank, _) in failures.items()}
    log = (workdir / "rank-0.log").read_text()
    for step, rank, reason in said:
        assert os.strerror(failures[step][1]) in reason
        assert f"rank {rank} on" in reason
        assert reason in log
    saved = [step for (step,) in events(run_dir, "checkpoint", "step")]
    assert saved in ([8], [])  # one that takes long is left out
    newest, passed_over = newest_valid(run_dir)
    assert (newest is not None) == bool(saved)
    assert not passed_over
    assert not list((run_dir / "checkpoints").glob(".step-00000004*"))  # it gave its room back
    outcome = read_outcome(run_dir, 1)
    assert outcome is not None
    assert outcome["exit_code"] == 10
    assert os.strerror(failures[12][1]) in outcome["reason"]
    assert (checkpoint_name(8) if saved else "no checkpoint") in outcome["reason"]


def test_a_log_that_cannot_be_written_for_a_while_is_whole_in_the_end(server: ForkServer, workdir: Path) -> None:
    run_dir = workdir / "run"
    writes = f"{run_dir}/@(metrics/*|events.jsonl|checkpoints/*)"  # of which the first are one event and two steps
    fault = failing(writes, errno.ENOSPC, Operation.WRITE, first=4, calls=8)
    assert server.train(workdir, "test.yaml", faults={0: fault}) == [0, 0]
    assert "the run log waits in memory" in (workdir / "rank-0.log").read_text()
    assert [record["step"] for record in read_attempt(run_dir, 1)] == STEPS
    assert [step for (step,) in events(run_dir, "checkpoint_failed", "step")] == [4]
    assert events(run_dir, "checkpoint", "step")[-1] == (12,)


def test_a_disk_that_stays_full_ends_the_run_with_10_and_the_reason_and_with_room_it_goes_on(
    server: ForkServer, workdir: Path
) -> None:
    run_dir = workdir / "run"
    fault = full(f"{run_dir}/@(metrics/*|events.jsonl|checkpoints/*|attempts/*/*outcome*)", errno.ENOSPC, 2_000)
    assert server.train(workdir, "test.yaml", faults={0: fault}) == [10, 10]
    last = (workdir / "rank-0.log").read_text().splitlines()[-1]
    assert "step 12 could not be saved" in last
    assert os.strerror(errno.ENOSPC) in last
    assert read_outcome(run_dir, 1) is None
    assert server.train(workdir, "test.yaml") == [0, 0]
    assert [record["step"] for record in read_metrics(run_dir)] == STEPS
    assert resolve_checkpoint(run_dir).manifest.progress.step == 12


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "manifest.json"])
def test_any_flipped_byte_is_found_and_named_and_the_checkpoint_before_is_used(name: str, tmp_path: Path) -> None:
    assert save(tmp_path, 4) is save(tmp_path, 8) is None
    damaged = tmp_path / "checkpoints/step-00000008" / name
    content = damaged.read_bytes()
    for position, byte in enumerate(content):
        damaged.write_bytes(content[:position] + bytes([byte ^ 1 << position % 8]) + content[position + 1 :])
        reader, problems = newest_valid(tmp_path)
        assert reader is not None
        assert reader.directory.name == "step-00000004"
        assert str(damaged) in problems["step-00000008"]
    damaged.write_bytes(content)
    assert check_content(resolve_checkpoint(tmp_path)) == 8
