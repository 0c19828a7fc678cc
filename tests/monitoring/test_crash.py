"""What a failed attempt left is put together: what it was, who was first, what was said, where everyone stood."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from monitoring.crashes.last_words import of_rank
from monitoring.crashes.report import LINES, crash_report, read_crash_report, report_crashes, write_crash_report

TORN_DOWN = """srun: launch/slurm: _step_signal: Terminating StepId=1.0
srun: error: n1: tasks 0-1: Terminated
srun: Force Terminated StepId=1.0
"""
MPICH = """
===================================================================================
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 103 RUNNING AT cray
=   EXIT CODE: 9
=   CLEANING UP REMAINING PROCESSES
===================================================================================
YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)
"""
SEGFAULT = """step 5
Fatal Python error: Segmentation fault

Current thread 0x00007fed7364fb80 (most recent call first):
  File "train.py", line 20 in forward

Extension modules: numpy (total: 1)
"""
TRACEBACK = """Traceback (most recent call last):
  File "train.py", line 22, in <module>
    raise KeyError("no such thing")
KeyError: 'no such thing'
"""
OOM = "slurmstepd-n2: error: Detected 1 oom_kill event in StepId=1.0. Some of the step tasks have been OOM Killed.\n"


class Run:
    """A run of four ranks on two nodes, as it looks after an attempt has ended."""

    def __init__(self, path: Path) -> None:
        self.path, self.attempt = path, path / "attempts/0001"
        (self.attempt / "nodes").mkdir(parents=True)
        (path / "jobs/7/1").mkdir(parents=True)
        (path / "metrics").mkdir()
        self.json("environment.json", {"ranks": [{"host": "cray", "pid": 101 + rank} for rank in range(4)]})
        for host, first in (("n1", 0), ("n2", 2)):
            ranks = {str(rank): {"step": 17, "phase": "forward", "state": "S"} for rank in (first, first + 1)}
            self.json(f"nodes/{host}.json", {"time": 50.0, "host": host, "ranks": ranks})
        (path / "metrics/0001.jsonl").write_text(f'{{"step": 16, "time": 49.0, "pad": "{"x" * 5000}"}}\n{{"step": 17')
        self.job("launched", 10.0, launch=1, attempts=0, nodes=["n1", "n2"], log="jobs/7/1")

    def json(self, name: str, content: dict[str, Any]) -> None:
        (self.attempt / name).write_text(json.dumps(content))

    def job(self, kind: str, time: float, **fields: Any) -> None:
        with (self.path / "jobs.jsonl").open("a") as file:
            file.write(json.dumps({"kind": kind, "time": time, "job": "7"} | fields) + "\n")

    def end(self, status: int | None, reason: str = "its attempt left no outcome") -> None:
        self.job("ended", 60.0, launch=1, attempt=1, status=status, code=None, reason=reason)

    def say(self, file: str, text: str) -> None:
        (self.path / "jobs/7/1" / file).write_text(text)

    def fail(self, rank: int, error: str, when: float) -> None:
        place = {"rank": rank, "host": "cray", "phase": "backward", "step": 18}
        self.json(name := f"failure-{rank:05d}.json", place | {"error": [error]})
        os.utime(self.attempt / name, (when, when))

    def report(self) -> dict[str, Any]:
        found = crash_report(self.path, 1)
        assert found is not None
        return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ({"srun.log": f"srun: error: n2: task 3: Killed\n{TORN_DOWN}"}, ("killed", "SIGKILL", 3, "n2")),
        ({"node-0.log": MPICH}, ("killed", "SIGKILL", 2, "n2")),
        ({"srun.log": "x1000: rank 3 died from signal 9\n"}, ("killed", "SIGKILL", 3, "x1000")),
        (
            {"srun.log": "mpirun noticed that process rank 1 with PID 0 on node n1 exited on signal 7 (Bus error).\n"},
            ("fatal signal", "SIGBUS", 1, "n1"),
        ),
        ({"node-0.log": "failed (exitcode: -9) local_rank: 1 (pid: 102) of binary\n"}, ("killed", "SIGKILL", 1, "n1")),
        (
            {"srun.log": f"srun: error: n2: task 2: Segmentation fault\n{TORN_DOWN}", "node-1.log": SEGFAULT},
            ("fatal signal", "SIGSEGV", 2, "n2"),
        ),
        ({"node-1.log": SEGFAULT}, ("fatal signal", "SIGSEGV", None, None)),
        (
            {"srun.log": f"srun: error: n2: task 3: Killed\n{TORN_DOWN}", "node-1.log": OOM},
            ("out of memory", None, 3, "n2"),
        ),
        ({"srun.log": f"srun: error: n2: tasks 2-3: Out Of Memory\n{TORN_DOWN}"}, ("out of memory", None, 2, "n2")),
        (
            {"srun.log": f"srun: error: n2: task 3: Exited with exit code 1\n{TORN_DOWN}", "node-1.log": TRACEBACK},
            ("exception", "KeyError", 3, "n2"),
        ),
        ({"srun.log": f"srun: error: n2: task 3: Exited with exit code 5\n{TORN_DOWN}"}, ("unknown", None, 3, "n2")),
        ({"srun.log": f"srun: error: Node failure on n2\n{TORN_DOWN}"}, ("node lost", None, None, "n2")),
        (
            {"node-0.log": "slurmstepd: error: *** STEP 1.0 ON n1 CANCELLED AT 2026-11-23T07:46 DUE TO TIME LIMIT ***"},
            ("cancelled", "time limit", None, None),
        ),
        ({}, ("killed", "SIGTERM", None, None)),
    ],
)
def test_a_killed_run_is_explained_by_what_launcher_and_ranks_said(
    run: Run, logs: dict[str, str], expected: tuple[Any, ...]
) -> None:
    for name, text in ({"node-0.log": "hello 0\n", "node-1.log": "hello 1\n"} | logs).items():
        run.say(name, text)
    run.end(143)
    found = run.report()
    assert (found["class"], found["kind"], found["rank"], found["host"]) == expected
    assert found["summary"].startswith(found["class"])
    assert (found["job"], found["launch"], found["nodes"], found["status"]) == ("7", 1, ["n1", "n2"], 143)
    assert (found["start"], found["end"], found["last_step"]) == (10.0, 60.0, 16)
    assert sorted(found["last_steps"]) == ["0", "1", "2", "3"]
    assert found["last_steps"]["3"] == {"host": "n2", "time": 50.0, "step": 17, "phase": "forward", "state": "S"}
    if found["rank"] is not None:
        assert (found["step"], found["phase"]) == (17, "forward")
        assert found["log"] == f"jobs/7/1/node-{found['rank'] // 2}.log"
        assert found["lines"]
    if found["kind"] in ("SIGSEGV", "KeyError"):
        assert "train.py" in found["stacks"][0]["text"]
        assert "Extension" not in found["stacks"][0]["text"]


def test_a_job_that_was_told_to_end_was_not_at_fault(run: Run) -> None:
    run.say("srun.log", f"srun: error: n2: task 3: Killed\n{TORN_DOWN}")
    run.end(143, "the ranks were ended by SIGTERM; the job was told to end by SIGTERM")
    assert run.report()["class"] == "cancelled"


def test_the_first_exception_counts_and_not_what_follows_from_it(run: Run) -> None:
    run.fail(2, "Traceback (most recent call last):\n  File\nValueError: rows are torn\nand more\n", 40.0)
    run.fail(0, "Traceback (most recent call last):\n  File\nRuntimeError: Connection closed by peer\n", 41.0)
    run.say("srun.log", f"srun: error: n1: task 0: Killed\n{TORN_DOWN}")  # the launcher may speak in any order
    run.end(1)
    found = run.report()
    assert (found["class"], found["kind"], found["rank"], found["step"]) == ("exception", "ValueError", 2, 18)
    assert [stack["rank"] for stack in found["stacks"]] == [2, 0]
    outcome = {"exit_code": 1, "reason": "rank 2 on cray, backward of step 18: ValueError: rows are torn", "rank": 2}
    run.json("outcome.json", outcome | {"host": "cray", "time": 42.0})
    assert run.report()["summary"] == "exception: rank 2 on cray, backward of step 18: ValueError: rows are torn"
    # A rank that was killed fails the others, which then say that their connections broke.
    run.fail(2, "RuntimeError: [gloo] timed out\n", 40.0)
    run.say("srun.log", f"srun: error: n2: task 3: Killed\n{TORN_DOWN}")
    assert (run.report()["class"], run.report()["rank"]) == ("killed", 3)


@pytest.mark.parametrize(
    "error", ["torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2 GiB", "OSError: Cannot allocate memory"]
)
def test_an_exception_for_want_of_memory_is_called_that(run: Run, error: str) -> None:
    run.fail(1, f"Traceback (most recent call last):\n  File\n{error}\n", 40.0)
    assert (run.report()["class"], run.report()["rank"]) == ("out of memory", 1)


@pytest.mark.parametrize(
    ("code", "fields", "name"),
    [
        (11, {"rank": 3, "host": "cray"}, "diverged"),
        (12, {}, "refused"),
        (13, {"hosts": ["n2"]}, "unhealthy node"),
    ],
)
def test_an_attempt_that_said_why_it_ended_is_believed(run: Run, code: int, fields: dict[str, Any], name: str) -> None:
    run.json("outcome.json", {"exit_code": code, "reason": "so it is", "time": 42.0} | fields)
    run.say("srun.log", TORN_DOWN)
    found = run.report()
    assert (found["class"], found["exit_code"], found["end"]) == (name, code, 42.0)
    assert "so it is" in found["summary"]
    assert found["host"] == fields.get("host", fields.get("hosts", [None])[0])


def test_a_hang_is_told_with_the_stacks_of_the_stalled_rank_first(run: Run) -> None:
    (run.attempt / "hang").mkdir()
    ranks = [{"rank": rank, "host": "cray", "step": 18, "phase": "forward", "state": "S"} for rank in range(3)]
    for rank in range(3):
        (run.attempt / f"hang/rank-{rank:05d}.txt").write_text(
            json.dumps(ranks[rank]) + "\nThread (most recent call)\n"
        )
    stalled = [ranks[2] | {"state": "T"}]
    run.json("hang.json", {"reason": "hang: nothing moved for 6 s", "stalled": stalled, "ranks": ranks, "time": 51.0})
    run.json("outcome.json", {"exit_code": 1, "reason": "hang: nothing moved for 6 s", "time": 51.0})
    run.say("srun.log", "srun: error: n2: task 2: Killed\n")  # by the watchdog
    found = run.report()
    assert (found["class"], found["rank"], found["step"]) == ("hang", 2, 18)
    assert found["summary"] == "hang: rank 2 on cray: nothing moved for 6 s"
    assert found["stacks"][0]["source"] == "hang/rank-00002.txt"
    assert (found["last_steps"]["2"]["step"], found["last_steps"]["3"]["step"]) == (18, 17)


def test_a_node_that_the_links_found_lost_is_named(run: Run) -> None:
    run.end(None, "the job ended without a word")
    for node, reason in (("n1", "slow"), ("n2", "lost after job 7"), ("n9", "lost after job 8")):
        with (run.path / "quarantine.jsonl").open("a") as file:
            file.write(json.dumps({"time": 70.0, "node": node, "reason": reason, "job": "7"}) + "\n")
    assert (run.report()["class"], run.report()["host"]) == ("node lost", "n2")


def test_only_the_last_lines_are_kept_and_of_a_labelled_log_those_of_the_rank(run: Run) -> None:
    lines = [f"{rank}: step {step}" for step in range(200_000 // 4) for rank in (2, 3)]
    run.say("node-1.log", "\n".join([*lines, "slurmstepd: error: gone"]))
    run.say("srun.log", "srun: error: n2: task 3: Killed\n")
    assert run.report()["lines"] == [f"step {step}" for step in range(50_000 - LINES, 50_000)]
    assert of_rank(["step 1", "3: of 4", "step 2"], 3) == ["step 1", "3: of 4", "step 2"]


def test_a_report_is_written_for_attempts_that_failed_whatever_is_missing(run: Run) -> None:
    assert write_crash_report(run.path, 1) == run.attempt / "crash.json"
    written = read_crash_report(run.path, 1)
    assert written is not None
    assert written["class"] == "unknown"
    for number, outcome in ((2, '{"exit_code": 10}'), (3, "[torn"), (4, "")):
        (run.path / f"attempts/{number:04d}").mkdir()
        if outcome:
            (run.path / f"attempts/{number:04d}/outcome.json").write_text(outcome)
    report_crashes(run.path, 4)
    reports = {path.parent.name: path.stat().st_mtime_ns for path in run.path.glob("attempts/*/crash.json")}
    assert sorted(reports) == ["0001", "0003"]  # 2 ended well, and 4 is only just beginning
    shutil.rmtree(run.path / "jobs")
    assert crash_report(run.path, 1) is not None
    (run.attempt / "crash.json").write_text("{")
    assert read_crash_report(run.path, 1) is None
    for damage in ("environment.json", "nodes/n1.json", "hang.json", "failure-00001.json"):
        (run.attempt / damage).write_text('{"ranks": 3, "stalled": "x", "error": 5, "time": "now"}')
    assert write_crash_report(run.path, 1) is not None


def test_a_report_on_a_full_disk_is_no_second_failure(run: Run) -> None:
    run.attempt.chmod(0o500)
    try:
        if os.access(run.attempt, os.W_OK):  # as root
            shutil.rmtree(run.attempt)
        assert write_crash_report(run.path, 1) is None
    finally:
        if run.attempt.exists():
            run.attempt.chmod(0o700)


def test_ranks_that_are_gone_from_a_node_that_stands_were_killed(run: Run) -> None:
    (run.path / "jobs.jsonl").unlink()
    run.json("environment.json", {"ranks": [{"host": os.uname().nodename, "pid": 101}]})
    assert (run.report()["class"], run.report()["rank"]) == ("killed", 0)
    before_the_node_started = time.time() - 10 * 365 * 86400
    os.utime(run.attempt / "environment.json", (before_the_node_started, before_the_node_started))
    assert run.report()["class"] == "unknown"
