"""What one rank knows, all ranks act on at the same step; and a run ends itself before its time is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.world import World
from monitoring.runlog import read_attempt, read_events, read_metrics, read_outcome
from pipeline.checkpoints.reader import resolve_checkpoint
from pipeline.control import ControlConfig, Flag, RunControl, StopSignals
from pipeline.errors import ConfigError
from pipeline.job_time import parse_time_left, seconds_left
from slurm.local import rank_command, rank_environment
from tests.ranks import forked_python, rookery

ASKED = 1


def test_a_signal_to_one_rank_stops_all_at_one_step_and_is_named(workdir: Path) -> None:
    number = signal.SIGUSR1
    run, attempt = workdir / "run", workdir / "run/attempts/0001"
    overrides = ["train.steps=100000", "checkpoint.every=100000"]
    training = subprocess.Popen(
        rank_command(
            3, [*forked_python(), "-m", "rookery", "train", "test.yaml", *overrides, "train.global_batch_size=6"]
        ),
        cwd=workdir,
        env=rank_environment(3),
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (attempt.is_dir() and read_attempt(run, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(json.loads((attempt / "environment.json").read_text())["ranks"][ASKED]["pid"], number)
    assert training.wait(60) == 10
    outcome = read_outcome(run, 1)
    assert outcome is not None
    step = outcome["step"]
    assert f"{number.name} on rank {ASKED} ({outcome['host']}), saved at step {step}" in outcome["reason"]
    assert (outcome["flag"], outcome["rank"], outcome["ranks"]) == ("signal", ASKED, 1)
    assert resolve_checkpoint(run).manifest.progress.step == read_metrics(run)[-1]["step"] == step
    (event,) = (event for event in read_events(run) if event["kind"] == "stop")
    assert (event["rank"], event["detail"], event["step"]) == (ASKED, number.name, step)


def test_a_run_saves_and_stops_before_its_time_is_over(workdir: Path) -> None:
    done = rookery(
        "train",
        "test.yaml",
        "train.steps=100000",
        "checkpoint.every=100000",
        "control.time_limit_minutes=0.2",
        "control.stop_margin_seconds=2",
        cwd=workdir,
    )
    assert done.returncode == 10, done.stderr
    outcome = read_outcome(workdir / "run", 1)
    assert outcome is not None
    assert outcome["flag"] == "time_left"
    (start,) = (event for event in read_events(workdir / "run") if event["kind"] == "start")
    assert outcome["time"] - start["time"] < 12
    assert resolve_checkpoint(workdir / "run").manifest.progress.step == outcome["step"]


def test_a_stop_leaves_time_for_a_save_twice_as_long_as_the_last_and_for_the_longest_step() -> None:
    def asked_to_stop(minutes: float, save_seconds: float, longest_step: float, *, saving: int = 0) -> bool:
        config = ControlConfig(time_limit_minutes=minutes, stop_margin_seconds=10.0)
        control = RunControl(config, World(), StopSignals())
        control.save_seconds, control.saving = save_seconds, saving
        cause = control.agree(1.0, None, longest_step, []).wait().cause
        assert cause is None or cause.flag is Flag.TIME_LEFT
        return cause is not None

    assert not asked_to_stop(1.0, 5.0, 5.0)
    assert not asked_to_stop(1.0, 20.0, 5.0)
    assert asked_to_stop(1.0, 20.0, 15.0)
    assert asked_to_stop(1.0, 20.0, 5.0, saving=1)
    assert not asked_to_stop(1.0, 15.0, 5.0, saving=1)
    assert asked_to_stop(1.0, 30.0, 0.0)
    assert asked_to_stop(0.2, 5.0, 2.0)
    with pytest.raises(ConfigError, match="leaves nothing beside"):
        ControlConfig(time_limit_minutes=0.1, stop_margin_seconds=10.0)


@pytest.fixture
def listening() -> Iterator[StopSignals]:
    """Signals of this process, which are its own again after the test."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    previous = {number: signal.getsignal(number) for number in numbers}
    signals = StopSignals()
    signals.listen()
    yield signals
    for number, handler in previous.items():
        signal.signal(number, handler)


def test_a_second_interrupt_interrupts(listening: StopSignals) -> None:
    signal.raise_signal(signal.SIGINT)
    assert listening.received == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_of_several_causes_the_most_important_is_given(listening: StopSignals) -> None:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGUSR2)
    control = RunControl(ControlConfig(time_limit_minutes=0.001, stop_margin_seconds=0.05), World(), listening)
    loss, cause, sums = control.agree(float("nan"), "loss nan", 0.0, [2.0**52, 3.0]).wait()
    assert loss != loss
    assert sums == [2.0**52, 3.0]
    assert cause is not None
    assert (cause.flag, cause.detail) == (Flag.SIGNAL, "SIGTERM")
    control = RunControl(ControlConfig(), World(), StopSignals())
    control.verdict = "back"
    assert (found := control.agree(2.0, "a gradient", 0.0, []).wait().cause) is not None
    assert (found.flag, found.detail) == (Flag.VERDICT, "back")
    control.verdict = None
    assert (found := control.agree(2.0, "a gradient", 0.0, []).wait().cause) is not None
    assert (found.flag, found.detail) == (Flag.NON_FINITE, "a gradient")


def test_damaged_data_on_this_rank_is_raised_as_it_was() -> None:
    control = RunControl(ControlConfig(), World(), StopSignals())
    for alike in (True, False):
        assert control.count(1, (64, 2), None, alike=alike).wait() == (64, 2)
        with pytest.raises(OSError, match="row 7"):
            control.count(2, (0, 0), OSError("row 7"), alike=alike).wait()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-02:03:04", 93784.0),
        ("02:03:04", 7384.0),
        ("3:04", 184.0),
        ("0:00", 0.0),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("", None),
    ],
)
def test_what_squeue_says_of_the_time_left_is_understood(text: str, seconds: float | None) -> None:
    assert parse_time_left(text) == seconds


def test_the_end_of_the_job_is_taken_from_the_environment_else_from_squeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$*" = "-h -j 17 -o %L" ] && echo 1:30\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert seconds_left({}) is None
    assert seconds_left({"SLURM_JOB_END_TIME": str(int(time.time()) + 500)}) == pytest.approx(500.0, abs=5.0)
    assert seconds_left({"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": ""}) == 90.0
    assert seconds_left({"SLURM_JOB_ID": "18"}) is None
    squeue.write_text("no program")
    assert seconds_left({"SLURM_JOB_ID": "17"}) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("time_limit_minutes", 0.0),
        ("stop_margin_seconds", -1.0),
        ("hang_factor", 1.0),
        ("hang_floor_seconds", 0.0),
        ("hang_start_minutes", -1.0),
        ("hang_save_minutes", 0.0),
    ],
)
def test_limits_without_a_meaning_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"control.{key}: {value}"):
        ControlConfig(**{key: value})  # type: ignore[arg-type]
