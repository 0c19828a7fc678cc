"""Logs that are huge, damaged, incomplete or of another clock: every reader says so, and all say the same."""

from __future__ import annotations

import json
import re
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from monitoring.crashes.report import crash_report
from monitoring.figures import Panel, panels
from monitoring.goodput import LedgerReader
from monitoring.reading.run_reader import read_runs
from monitoring.report import write_report
from monitoring.runlog import RunLogError
from rookery.cli import app
from rookery.screen import snapshot
from rookery.status import describe
from slurm.status import status
from tests.monitoring.sample_run import START, build_run, step_record

GIGABYTE = 1 << 30


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.queue.available", lambda: False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = build_run(tmp_path / "run")
    (run / "run.yaml").write_text("train:\n  steps: 100\n")
    return run


@contextmanager
def _at_most(megabytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes << 20
    finally:
        tracemalloc.stop()


def _warnings(run: Path) -> list[str]:
    """Return what all readers say, which is the same."""
    said: list[str] = status(run)["warnings"]
    (view,) = read_runs([run])
    assert said == list(view.warnings) == snapshot(run)["warnings"]
    shown = "\n".join(describe(status(run), START))
    assert all(words in shown for words in said)
    return said


def _records(run: Path, attempt: int = 2) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"metrics/{attempt:04d}.jsonl").read_text().splitlines()]


def _rewrite(run: Path, records: list[dict[str, Any]], attempt: int = 2) -> None:
    (run / f"metrics/{attempt:04d}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


def test_a_whole_log_is_odd_to_nobody(run: Path) -> None:
    assert _warnings(run) == []


def test_status_of_a_huge_line_takes_little_memory_and_says_what_it_did_not_see(run: Path) -> None:
    with (run / "metrics/0002.jsonl").open("r+b") as file:
        file.truncate(GIGABYTE)
    with _at_most(64):
        answer = status(run)
    assert answer["attempts"][-1]["steps"][0] == 51
    said = "\n".join(answer["warnings"])
    assert re.search(r"metrics/0002\.jsonl: its last 64 kB, of 1\.07 GB, hold no step", said)
    assert "`rookery report" in said
    assert answer["ledger"]["share"] is None
    describe(answer, START)


def test_report_and_watch_of_a_huge_line_take_little_memory(run: Path, tmp_path: Path) -> None:
    with (run / "metrics/0003.jsonl").open("wb") as file:
        file.truncate(GIGABYTE // 4)
    write_report([build_run(tmp_path / "other")], tmp_path / "warm.html")  # the page's own script takes memory once
    with _at_most(160):
        write_report([run], tmp_path / "report.html")
        assert snapshot(run)["step"] == 100
    assert "over a megabyte" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "line", ['{"step":-5,"seconds":1}', '{"step":1.5,"seconds":1}', '{"step":0}', '{"step":101,"loss":NaN}', "[]", "{"]
)
def test_a_line_that_is_no_step_changes_nothing_and_is_counted(run: Path, line: str) -> None:
    before = LedgerReader(run).read()
    (run / "metrics/0002.jsonl").open("a").write(line + "\n")
    assert _warnings(run) == ["1 unreadable line in the log skipped"]
    assert LedgerReader(run).read() == before
    assert status(run)["step"] == snapshot(run)["step"] == 100


def test_a_step_beyond_the_plan_is_shown_and_said(run: Path) -> None:
    records = _records(run)
    _rewrite(run, [*records, step_record(101) | {"time": records[-1]["time"] + 1.0}])
    (said,) = _warnings(run)
    assert "step 101 is beyond the 100" in said
    assert status(run)["step"] == snapshot(run)["step"] == 101


@pytest.mark.parametrize("again_at", [80, None])
def test_a_clock_set_back_moves_no_time_from_one_part_to_another(run: Path, again_at: int | None) -> None:
    (run / "attempts/0002/outcome.json").write_text(json.dumps({"exit_code": 0, "time": START + 161.0}))
    right = LedgerReader(run).read()
    records = _records(run)
    for record in records:
        if record["step"] >= 70 and (again_at is None or record["step"] < again_at):
            record["time"] -= 86_400.0
    _rewrite(run, records)
    found = LedgerReader(run).read()
    assert found.productive == right.productive
    assert asdict(found) == pytest.approx(asdict(right), abs=60.0)
    assert _warnings(run) == ["the clock was set back by 86,399 s at step 70"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("events.jsonl", r"events\.jsonl is missing: .*goodput"),
        ("metrics/0001.jsonl", r"steps of attempt 1 are missing: there is no metrics/0001\.jsonl"),
    ],
)
def test_a_missing_file_is_said(run: Path, name: str, words: str) -> None:
    (run / "attempts/0001/heartbeat.json").write_text(json.dumps({"time": START}))
    (run / name).unlink()
    (said,) = _warnings(run)
    assert re.search(words, said)


@pytest.mark.parametrize("name", ["events.jsonl", "metrics/0001.jsonl", "run.yaml"])
def test_a_file_that_cannot_be_read_is_said(run: Path, name: str) -> None:
    (run / name).unlink()
    (run / name).mkdir()  # unreadable to root, too
    assert f"{name} cannot be read: Is a directory" in _warnings(run)


def test_two_writers_and_a_broken_configuration_are_said(run: Path) -> None:
    records = _records(run)
    _rewrite(run, [*records[:20], *records[10:]])
    (run / "run.yaml").write_text("train:\n  steps: [1\n")
    said = "\n".join(_warnings(run))
    assert "did two jobs write to this run at once?" in said
    assert "run.yaml is broken, line" in said


def test_a_crash_after_the_last_heartbeat_is_placed_behind_the_newest_step(run: Path) -> None:
    (run / "attempts/0001/environment.json").write_text(json.dumps({"ranks": [{"host": socket.gethostname()}]}))
    beat = {"time": START, "step": 24, "phase": "backward"}
    (run / "attempts/0001/heartbeat.json").write_text(json.dumps(beat))
    report = crash_report(run, 1)
    assert report is not None
    assert "after step 60 (last heartbeat: backward of step 24)" in report["summary"]
    assert (report["step"], report["phase"], report["last_step"]) == (60, None, 60)
    (run / "attempts/0001/heartbeat.json").write_text(json.dumps(beat | {"step": 61}))
    assert "backward of step 61" in (crash_report(run, 1) or {})["summary"]


def _odd_events(run: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "finding"},
        {"kind": "finding", "detector": ["a"], "step": "x", "reason": {"a": 1}},
        {"kind": "checkpoint", "step": {}, "seconds": "z"},
    ]
    skipped = {"kind": "checkpoint_skipped", "attempt": 2, "tier": "shared", "reason": "busy"}
    lines += [skipped | {"step": step, "time": START + step} for step in range(50)]
    with (run / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_odd_and_repeated_events_stay_readable(run: Path, tmp_path: Path) -> None:
    _odd_events(run)
    assert snapshot(run)["checkpoint_step"] == 100
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "50 times, the last one:" in page
    assert page.count("checkpoint_skipped") == 1
    assert "(, not done)" not in page


@pytest.mark.parametrize("make", [lambda run: None, lambda run: (run / "data").mkdir()])
def test_a_directory_that_is_no_run_is_bad_input_to_every_command(
    tmp_path: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    refusals = set()
    for command in (["watch", "--json"], ["report", "--out", str(tmp_path / "x.html")], ["alerts"], ["status"]):
        result = CliRunner().invoke(app, [*command, str(tmp_path)])
        assert isinstance(result.exception, RunLogError), command
        refusals.add(str(result.exception))
    assert len(refusals) == 1


def test_a_run_that_has_only_just_begun_can_be_watched_and_reported(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.yaml").write_text("name: x\n")
    assert snapshot(tmp_path / "run")["state"] == "empty"
    write_report([tmp_path / "run"], tmp_path / "report.html")


def test_status_says_why_a_run_failed_once_and_short_times_in_seconds(run: Path) -> None:
    outcome = {"exit_code": 11, "reason": "gave up at step 100: it fell", "time": START + 161.0}
    (run / "attempts/0002/outcome.json").write_text(json.dumps(outcome))
    answer = status(run) | {"checkpoint": {"step": 90, "age_seconds": 32.0}}
    shown = "\n".join(describe(answer, START))
    assert shown.count("gave up at step 100") == 1
    assert "32 s old" in shown
    (view,) = read_runs([run])
    assert view.attempts[-1].ending == "diverged: gave up at step 100: it fell"


def test_times_of_a_single_node_are_no_panel(run: Path) -> None:
    _rewrite(run, [record | {"nodes": {"n1": 1.0}} for record in _records(run)])
    assert not _panel(run, "nodes").traces
    _rewrite(run, [record | {"nodes": {"n1": 1.0, "n2": 1.1}} for record in _records(run)])
    assert _panel(run, "nodes").traces


def _panel(run: Path, key: str) -> Panel:
    return next(panel for panel in panels(read_runs([run])) if panel.key == key)
