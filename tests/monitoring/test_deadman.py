"""The dead-man check, on run directories as ranks leave them, with clocks that are wrong."""

import json
import os
from pathlib import Path

import pytest

from monitoring.alerting.deadman import DeadMan, DeadManConfig, Pulse
from monitoring.errors import MonitorConfigError
from monitoring.runlog import RunLogError

NOW = 1_800_000_000.0
CONFIG = DeadManConfig(silent_minutes=5.0, stalled_factor=20.0, start_minutes=60.0)


class Run:
    """A run directory and two clocks of whoever looks at it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.ticks = folder, NOW, 0.0
        (folder / "attempts").mkdir()
        (folder / "metrics").mkdir()
        self.dead_man = DeadMan(folder, CONFIG, lambda: self.now, lambda: self.ticks)

    def attempt(self, number: int = 1, began: float = NOW) -> Path:
        directory = self.folder / "attempts" / f"{number:04d}"
        directory.mkdir()
        (directory / "run.yaml").write_text("name: x\n")
        os.utime(directory / "run.yaml", (began, began))
        return directory

    def beat(self, said: float, modified: float | None = None, step: int = 20, phase: str = "forward") -> None:
        path = self.folder / "attempts" / "0001" / "heartbeat.json"
        path.write_text(json.dumps({"time": said, "step": step, "phase": phase}))
        os.utime(path, (modified or said, modified or said))

    def steps(self, *times: float, modified: float | None = None) -> None:
        path = self.folder / "metrics" / "0001.jsonl"
        path.write_text("".join(json.dumps({"step": n, "time": at}) + "\n" for n, at in enumerate(times, 1)) + '{"st')
        os.utime(path, (modified or times[-1], modified or times[-1]))

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.ticks += seconds

    def look(self) -> Pulse:
        return self.dead_man.look()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def _paced(run: Run, seconds: float = 10.0, number: int = 20, last: float = NOW) -> None:
    run.steps(*(last - seconds * (number - 1 - n) for n in range(number)))


def test_what_has_not_begun_or_has_ended_is_no_alarm(run: Run) -> None:
    with pytest.raises(RunLogError, match="no run directory"):
        DeadMan(run.folder / "metrics", DeadManConfig()).look()
    (run.folder / "run.yaml").write_text("name: x\n")
    assert run.look().state == "waiting"
    outcome = run.attempt(began=NOW - 1e6) / "outcome.json"
    for code, state, alarm in (
        (0, "finished", False),
        (10, "stopped", False),
        (1, "failed", True),
        (13, "failed", True),
    ):
        outcome.write_text(json.dumps({"exit_code": code, "reason": "why"}))
        assert (run.look().state, run.look().alarm) == (state, alarm)


def test_a_heart_that_stops_is_an_alarm_until_it_beats_again(run: Run) -> None:
    run.attempt()
    _paced(run)
    run.beat(NOW)
    assert run.look().state == "alive"
    assert run.look().step == 20
    run.later(290.0)
    assert run.look().state == "alive"
    run.later(20.0)
    silent = run.look()
    assert silent.alarm
    assert "no sign of life for 5 min" in silent.reason
    assert (silent.value, silent.threshold) == (310.0, 300.0)
    run.later(60.0)
    assert run.look().mark == silent.mark, "it is one silence"
    run.beat(run.now)
    _paced(run, last=run.now)
    assert run.look().state == "alive"


def test_a_heart_that_beats_while_no_step_is_done_is_an_alarm_after_what_the_pace_makes_likely(run: Run) -> None:
    run.attempt()
    _paced(run, seconds=30.0)  # 20 times the longest step is 10 minutes
    for _ in range(59):
        run.beat(run.now)
        assert run.look().state == "alive"
        run.later(10.0)
    run.later(20.0)
    run.beat(run.now, step=21)
    stalled = run.look()
    assert stalled.alarm
    assert "no step for 10 min, in phase 'forward'" in stalled.reason


def test_a_save_and_the_first_steps_take_their_time(run: Run) -> None:
    run.attempt(began=NOW)
    run.beat(NOW + 3000.0, phase="build")
    run.later(3000.0)
    assert run.look().state == "alive"
    _paced(run, seconds=1.0, last=NOW)
    run.beat(NOW + 3000.0, phase="save")
    assert run.look().state == "alive"
    run.later(700.0)
    run.beat(run.now, phase="save")
    assert run.look().state == "alive"
    run.beat(run.now, phase="forward")
    assert run.look().alarm


def test_without_a_heartbeat_the_steps_are_the_signs(run: Run) -> None:
    run.attempt(began=NOW)
    run.later(3500.0)
    assert run.look().state == "alive"
    run.later(200.0)
    assert run.look().alarm
    _paced(run, last=run.now)
    assert run.look().state == "alive"
    run.later(310.0)
    assert run.look().alarm


@pytest.mark.parametrize("skew", [-7200.0, 7200.0], ids=["behind", "ahead"])
def test_a_node_whose_clock_is_wrong_is_alive_as_long_as_it_writes(run: Run, skew: float) -> None:
    run.attempt()
    _paced(run, last=NOW + skew)
    os.utime(run.folder / "metrics" / "0001.jsonl", (NOW, NOW))
    run.beat(NOW + skew, modified=NOW)
    assert run.look().state == "alive"
    run.later(400.0)
    assert run.look().alarm


def test_a_file_system_with_a_wrong_clock_hides_a_death_only_from_the_first_look(run: Run) -> None:
    run.attempt()
    ahead = NOW + 7200.0
    _paced(run, last=ahead)
    run.beat(ahead)
    assert run.look().state == "alive", "the time stamps say nothing"
    run.later(310.0)
    assert run.look().alarm, "nothing changed while we watched"


def test_a_clock_that_jumps_while_we_watch_changes_nothing(run: Run) -> None:
    run.attempt()
    _paced(run)
    run.beat(NOW)
    assert run.look().state == "alive"
    for jump in (86400.0, -86400.0):
        run.now += jump
        assert run.look().state == "alive"
    run.ticks += 310.0
    assert run.look().alarm


def test_a_clock_that_was_set_forward_once_does_not_stretch_the_pace(run: Run) -> None:
    run.attempt()
    times = [NOW - 7400.0 + n for n in range(20)] + [NOW - 19.0 + n for n in range(20)]
    run.steps(*times)
    run.beat(NOW)
    run.look()
    run.later(320.0)
    run.beat(run.now)
    assert run.look().alarm


def test_damaged_files_are_no_reason_to_fail(run: Run) -> None:
    directory = run.attempt(began=NOW)
    (directory / "heartbeat.json").write_text("[1")
    os.utime(directory / "heartbeat.json", (NOW, NOW))
    (run.folder / "metrics" / "0001.jsonl").write_bytes(b'\x00\xff{"step": "x"}\n[]\n' * 10)
    os.utime(run.folder / "metrics" / "0001.jsonl", (NOW, NOW))
    assert run.look().state == "alive"


def test_limits_without_a_meaning_are_refused() -> None:
    with pytest.raises(MonitorConfigError, match=r"monitor\.alerts\.dead_man\.silent_minutes: 0"):
        DeadManConfig(silent_minutes=0.0)
