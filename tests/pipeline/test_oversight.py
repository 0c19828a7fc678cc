"""What is decided about a run is done, whatever happens at the same moment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from monitoring.runlog import attempts, read_attempt, read_events
from slurm.local import rank_environment
from tests.pipeline.collapsing import FOUND
from tests.ranks import forked_python

ROOT = Path(__file__).parents[2]
BATCH = 8


def start(workdir: Path, *cases: str) -> int:
    environment = {**rank_environment(1), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*forked_python(), "-m", "tests.pipeline.collapsing", "test.yaml", *cases],
        cwd=workdir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode in (0, -9, 137), done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run a case of `tests.pipeline.collapsing`, started until it is done."""
    workdir = tmp_path_factory.mktemp("collapsing")
    for name in ("tokenizer", "data", "test.yaml"):
        (workdir / name).symlink_to(corpus / name)
    assert start(workdir, "plain", "told:told", "told", "precursors:precursors", "killed:killed") != 0
    start(workdir, "killed")
    return workdir


def codes(run: Path) -> list[int]:
    return [int(line.split()[0]) for line in (run / "codes").read_text().splitlines()]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["kind"] == kind]


def last_branch(run: Path) -> list[tuple[Any, ...]]:
    records = [record for attempt in attempts(run) for record in read_attempt(run, attempt) if record["branch"]]
    return [(each["step"], each["loss"], each["lr"], each["samples"], each["sample_hash"]) for each in records]


def test_a_collapse_goes_back_behind_its_first_sign(runs: Path) -> None:
    (rollback,) = events(runs / "plain", "rollback")
    assert (rollback["detector"], rollback["to_step"], rollback["branch"]) == ("collapse", 8, 1)
    assert rollback["samples_to"] == BATCH * (FOUND + 1 + 1)  # decided at one step, agreed on at the next, and one more
    assert codes(runs / "plain") == [0]
    assert [step for step, *_ in last_branch(runs / "plain")] == list(range(9, 21))


def test_a_run_that_is_told_to_stop_goes_back_at_its_next_start(runs: Path) -> None:
    run = runs / "told"
    assert codes(run) == [10, 0]
    (rollback,) = events(run, "rollback")
    assert (rollback["from_step"], rollback["to_step"]) == (FOUND, 8)
    assert [event["step"] for event in events(run, "start")] == [0, 8]
    assert [step for step, *_ in last_branch(run)] == list(range(9, 21))
    # One step of bad data less than where the rollback was agreed on a step later.
    assert last_branch(run)[0][3] == rollback["samples_to"] + BATCH


def test_a_run_that_is_killed_in_the_rollback_goes_on_as_if_it_were_not(runs: Path) -> None:
    run = runs / "killed"
    assert codes(run) == [0]
    assert len(events(run, "rollback")) == 1
    assert len(attempts(run)) == 2
    assert last_branch(run) == last_branch(runs / "plain")


def test_what_is_decided_while_something_else_is_done_is_not_forgotten(runs: Path) -> None:
    run = runs / "precursors"
    assert [event["step"] for event in events(run, "interval")] == [FOUND]
    assert [event["to_step"] for event in events(run, "rollback")] == [8]
    assert codes(run) == [0]
    saved = [event["step"] for event in events(run, "checkpoint")]
    # Every 2 steps for a while, though a save that is due beside another one comes a step later; and then no more.
    assert {10, 11} & set(saved)
    assert {14, 15} & set(saved)
    assert not {18, 19} & set(saved)
