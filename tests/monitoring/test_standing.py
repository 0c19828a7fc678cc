"""One word for how a run stands, from what its directory holds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from monitoring.reading.run_reader import RunReader
from monitoring.runlog import RunLog
from monitoring.standing import Standing, standing
from tests.monitoring.sample_run import step_record

NOW = 1_800_000_000.0


def attempt(
    run: Path, *, stepped: float | None = None, beaten: float | None = None, phase: str = "forward", begun: float = 0.0
) -> RunLog:
    """Write an attempt whose newest step and heartbeat are that many seconds old."""
    log = RunLog.open(run)
    if stepped is not None:
        for step in range(1, 101):
            log.step(step_record(step) | {"time": NOW - stepped - 0.5 * (100 - step), "seconds": 0.4})
    if beaten is not None:
        beat = {"time": NOW - beaten, "step": 100, "phase": phase}
        (log.attempt_dir / "heartbeat.json").write_text(json.dumps(beat))
    os.utime(log.attempt_dir, (NOW - begun, NOW - begun))
    return log


def look(run: Path) -> Standing:
    reader = RunReader(run)
    reader.poll()
    return standing(run, reader.view(NOW), NOW)


@pytest.mark.parametrize(
    ("signs", "state"),
    [
        ({"stepped": 1.0, "beaten": 2.0}, "running"),
        ({"stepped": 1.0}, "running"),  # its watchdog is off
        ({"stepped": 200.0, "beaten": 2.0, "phase": "save"}, "running"),
        ({"stepped": 200.0, "beaten": 2.0}, "stalled"),
        ({"stepped": 100.0, "beaten": 2.0}, "running"),  # deep steps take longer
        ({"stepped": 200.0, "beaten": 61.0}, "silent"),
        ({"stepped": 200.0}, "silent"),
        ({"beaten": 2.0, "phase": "build", "begun": 300.0}, "starting"),
        ({"begun": 10.0}, "starting"),
        ({"begun": 300.0}, "silent"),
    ],
)
def test_an_attempt_without_an_outcome_is_judged_by_its_signs_of_life(
    tmp_path: Path, signs: dict[str, float], state: str
) -> None:
    attempt(tmp_path, **signs)  # type: ignore[arg-type]
    found = look(tmp_path)
    assert found.state == state
    assert found.mood == {"running": "good", "starting": ""}.get(state, "bad")


@pytest.mark.parametrize(
    ("code", "state", "mood"),
    [(0, "finished", "good"), (10, "stopped with", "good"), (11, "diverged", "bad"), (1, "crashed", "bad")],
)
def test_an_attempt_with_an_outcome_stands_as_it_says(tmp_path: Path, code: int, state: str, mood: str) -> None:
    log = attempt(tmp_path, stepped=1.0, beaten=2.0)
    log.outcome(code, "because of it")
    found = look(tmp_path)
    assert found.state.startswith(state)
    assert (found.mood, "because of it" in found.detail, found.seconds_left) == (mood, True, None)
    assert found.since is not None


def test_an_attempt_that_was_resumed_does_not_inherit_the_last_ones_steps(tmp_path: Path) -> None:
    attempt(tmp_path, stepped=500.0).close()
    attempt(tmp_path, beaten=1.0, phase="load")
    found = look(tmp_path)
    assert (found.state, found.attempt, found.step) == ("starting", 2, 100)


def test_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    found = look(tmp_path)
    assert (found.state, found.warnings) == ("empty", [])
    assert {found.attempt, found.step, found.loss, found.checkpoint_age, found.seconds_left} == {None}


def test_the_figures_of_a_run_that_goes_on(tmp_path: Path) -> None:
    log = attempt(tmp_path, stepped=1.0, beaten=2.0)
    (tmp_path / "run.yaml").write_text("train:\n  steps: 300\n")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": NOW - 90, "attempt": 1, "kind": "checkpoint", "step": 50}) + "\n")
    found = look(tmp_path)
    assert (found.step, found.steps, found.checkpoint_step, found.checkpoint_age) == (100, 300, 50, 90.0)
    assert found.seconds_left == pytest.approx(200 * 0.5)  # by the clock: what passes between steps counts
    last = step_record(100)
    assert found.loss == pytest.approx(last["loss"], rel=1e-5)
    assert found.depth == sum(last["num_steps"])
    assert (found.heartbeat_age, found.step_age, found.warnings) == (2.0, 1.0, [])
    log.step(step_record(101) | {"time": NOW, "loss": float("nan")})
    assert look(tmp_path).loss == "nan"


def test_a_clock_that_is_ahead_is_said(tmp_path: Path) -> None:
    attempt(tmp_path, stepped=-30.0, beaten=-31.0)
    found = look(tmp_path)
    assert (found.state, found.step_age) == ("running", 0.0)
    assert "31 s ahead" in " ".join(found.warnings)
