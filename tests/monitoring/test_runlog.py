"""The run log survives what happens to runs: kills, torn lines, restarts, values that are no numbers."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.runlog import (
    MetricsFollower,
    RunLog,
    RunLogError,
    attempts,
    hold,
    read_attempt,
    read_events,
    read_metrics,
    read_outcome,
    replayed,
    write_atomic,
)
from tests.monitoring.plain_branches import branches


def _log(run_dir: Path, *attempts_steps: list[int]) -> None:
    """One attempt per list of steps; the loss tells which attempt wrote a record."""
    for steps in attempts_steps:
        log = RunLog.open(run_dir)
        for step in steps:
            log.step({"step": step, "loss": log.attempt + step / 1000})
        log.close()


def _steps(records: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(record["attempt"], record["step"]) for record in records]


def test_attempts_are_numbered_after_the_highest_there_is(tmp_path: Path) -> None:
    _log(tmp_path, [1])
    (tmp_path / "attempts" / "0007").mkdir()
    (tmp_path / "metrics" / "0011.jsonl").touch()
    log = RunLog.open(tmp_path)
    assert (log.attempt, log.attempt_dir) == (12, tmp_path / "attempts" / "0012")
    assert log.attempt_dir.is_dir()
    assert attempts(tmp_path) == [1, 7, 11, 12]


def test_a_new_attempt_changes_nothing_of_the_old_one(tmp_path: Path) -> None:
    _log(tmp_path, [1, 2])
    old = tmp_path / "metrics" / "0001.jsonl"
    before = (old.read_bytes(), old.stat().st_mtime_ns)
    _log(tmp_path, [2, 3])
    assert (old.read_bytes(), old.stat().st_mtime_ns) == before


def test_attempts_that_start_at_once_never_share_a_number(tmp_path: Path) -> None:
    def start(_: int) -> int | str:
        try:
            return RunLog.open(tmp_path).attempt
        except RunLogError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(start, range(24)))
    numbers = [result for result in results if isinstance(result, int)]
    refusals = [result for result in results if isinstance(result, str)]
    assert len(set(numbers)) == len(numbers) > 0
    assert all("another job is" in refusal for refusal in refusals)


def test_a_run_can_be_held_without_an_attempt(tmp_path: Path) -> None:
    with hold(tmp_path):
        assert not list(tmp_path.iterdir())
    log = RunLog.open(tmp_path)
    with pytest.raises(RunLogError, match=r"another job is at work on .* \(attempt 1\)"), hold(tmp_path):
        raise AssertionError
    log.close()
    with hold(tmp_path), pytest.raises(RunLogError, match="another job is at work"):
        RunLog.open(tmp_path)
    assert RunLog.open(tmp_path).attempt == 2
    with pytest.raises(RunLogError, match="no run directory"), hold(tmp_path / "nowhere"):
        raise AssertionError


def test_killing_the_writer_loses_no_step(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from monitoring.runlog import RunLog
log = RunLog.open(Path(sys.argv[1]))
for step in range(1, 51):
    log.step({"step": step, "loss": 1.0})
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 51))
    assert read_outcome(tmp_path, 1) is None


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text('ab\n"\\\u00e9\u4e16'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=10,
)


@given(value=_json)
def test_any_value_is_one_strict_json_line_and_reads_back(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    log = RunLog.open(run_dir)
    log.step({"step": 1, "value": value})
    log.close()

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = (run_dir / "metrics" / "0001.jsonl").read_text().splitlines()
    json.loads(line, parse_constant=refuse)
    (record,) = read_metrics(run_dir)
    assert repr(record["value"]) == repr(value)  # repr, because nan is not equal to itself


def test_values_that_are_not_finite_come_back_as_floats(tmp_path: Path) -> None:
    log = RunLog.open(tmp_path)
    log.step({"step": 1, "loss": math.nan, "state_rms": [1.0, math.inf, -math.inf]})
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"])
    assert record["state_rms"] == [1.0, math.inf, -math.inf]


def test_torn_lines_are_skipped_and_those_in_the_middle_counted(tmp_path: Path) -> None:
    _log(tmp_path, [1, 2, 3, 4])
    path = tmp_path / "metrics" / "0001.jsonl"
    first, second, third, fourth = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:9] + third + b'{"no": "step"}\n[1]\n\xff\n' + fourth[:-1])
    assert _steps(read_metrics(tmp_path)) == [(1, 1)]
    for content, damaged in ((path.read_bytes(), 4), (first + b"\n", 0)):
        path.write_bytes(content)
        follower = MetricsFollower(path)
        assert (len(follower.poll()), follower.damaged) == (1, damaged)


def test_a_follower_returns_each_record_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "0001.jsonl"
    follower = MetricsFollower(path)
    assert follower.poll() == []
    with path.open("ab", buffering=0) as file:
        file.write(b'{"step": 1}\n{"step"')
        assert follower.poll() == [{"step": 1}]
        assert follower.poll() == []
        file.write(b': 2}\noops\n{"step": 3}\n')
        assert follower.poll() == [{"step": 2}, {"step": 3}]
    assert follower.damaged == 1


def test_the_newest_attempt_wins_each_step(tmp_path: Path) -> None:
    _log(tmp_path, [1, 2, 3, 4, 5], [3, 4], [4])
    assert _steps(read_metrics(tmp_path)) == [(1, 1), (1, 2), (2, 3), (3, 4), (1, 5)]


def test_the_current_branch_is_what_the_newest_record_descends_from(tmp_path: Path) -> None:
    _log(tmp_path, [1, 2, 3, 4, 5], [3, 4], [4])
    current, abandoned = branches(tmp_path)
    assert _steps(current) == [(1, 1), (1, 2), (2, 3), (3, 4)]
    assert _steps(abandoned) == [(1, 3), (1, 4), (1, 5), (2, 4)]


def test_going_back_within_an_attempt_opens_a_branch_too(tmp_path: Path) -> None:
    _log(tmp_path, [1, 2, 3, 4, 2, 3])
    current, abandoned = branches(tmp_path)
    assert [record["step"] for record in current] == [1, 2, 3]
    assert [record["step"] for record in abandoned] == [2, 3, 4]


@given(histories=st.lists(st.lists(st.integers(1, 12), max_size=12), max_size=4))
def test_branches_split_all_records(histories: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    _log(run_dir, *histories)
    written = [(attempt, step) for attempt, steps in enumerate(histories, start=1) for step in steps]
    current, abandoned = branches(run_dir)
    assert sorted(_steps(current) + _steps(abandoned)) == sorted(written)
    assert _steps(current)[-1:] == written[-1:]
    steps = [record["step"] for record in current]
    assert steps == sorted(set(steps))


def test_replayed_pairs_a_step_with_its_next_version(tmp_path: Path) -> None:
    _log(tmp_path, [1, 2, 3], [3, 4], [3])
    pairs = [(old["attempt"], new["attempt"], old["step"]) for old, new in replayed(tmp_path)]
    assert pairs == [(1, 2, 3), (2, 3, 3)]
    assert all(old["step"] == new["step"] for old, new in replayed(tmp_path))
    assert [record["step"] for record in read_attempt(tmp_path, 2)] == [3, 4]


def test_events_of_all_attempts_are_read_in_order_past_a_torn_line(tmp_path: Path) -> None:
    first = RunLog.open(tmp_path)
    first.event("checkpoint", step=10)
    first.close()
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"time": 1, "kind": "che')  # the node died here
    second = RunLog.open(tmp_path)
    second.event("resume", step=10, evidence=math.inf)
    events = read_events(tmp_path)
    assert [(event["kind"], event["attempt"], event["step"]) for event in events] == [
        ("checkpoint", 1, 10),
        ("resume", 2, 10),
    ]
    assert events[1]["evidence"] == math.inf
    assert events[0]["time"] <= events[1]["time"]


def test_the_outcome_is_whole_or_absent(tmp_path: Path) -> None:
    log = RunLog.open(tmp_path)
    assert read_outcome(tmp_path, 1) is None
    log.outcome(10, "time is up", checkpoint="step-00000100")
    outcome = read_outcome(tmp_path, 1)
    assert outcome is not None
    assert (outcome["exit_code"], outcome["reason"], outcome["attempt"]) == (10, "time is up", 1)
    assert outcome["checkpoint"] == "step-00000100"
    assert [path.name for path in log.attempt_dir.iterdir()] == ["outcome.json"]


def test_a_failed_atomic_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomic(target, b"a file cannot replace a folder")
    assert list(tmp_path.iterdir()) == [target]


def test_a_run_that_logged_nothing_reads_as_nothing(tmp_path: Path) -> None:
    RunLog.open(tmp_path).close()
    assert read_metrics(tmp_path) == []
    assert read_attempt(tmp_path, 1) == []
    assert read_attempt(tmp_path, 99) == []
    assert read_events(tmp_path) == []
    assert replayed(tmp_path) == []
    assert branches(tmp_path) == ([], [])


@pytest.mark.parametrize("read", [attempts, read_metrics, read_events, replayed])
def test_a_missing_run_directory_is_named_with_the_next_action(tmp_path: Path, read: Any) -> None:
    with pytest.raises(RunLogError, match=r"no run directory .*nowhere: name the directory that `rookery train` wrote"):
        read(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_run_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunLogError, match=r"cannot start an attempt in .*file"):
        RunLog.open(tmp_path / "file" / "run")
    with pytest.raises(RunLogError, match=r"cannot start an attempt in .*file"):
        RunLog.open(tmp_path / "file")


def test_importing_the_log_is_fast_and_needs_no_library() -> None:
    code = """
import sys, time
start = time.perf_counter()
import monitoring.runlog
assert not {"torch", "numpy", "plotly", "bokeh"} & set(sys.modules), sorted(sys.modules)
print(time.perf_counter() - start)
"""
    root = Path(__file__).parents[2]
    runs = [subprocess.check_output([sys.executable, "-c", code], cwd=root) for _ in range(3)]
    assert min(map(float, runs)) < 0.3
