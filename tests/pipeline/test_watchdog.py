"""A rank that hangs is found, named with the place where it stood, and takes the run down with it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.world import World
from monitoring.crashes.report import read_crash_report
from monitoring.runlog import read_attempt, read_outcome
from pipeline.control import ControlConfig
from pipeline.journal import Journal, Traffic, process_state
from pipeline.step_cost import StepCost, non_negative_least_squares
from pipeline.watchdog import Watchdog, find_stalled
from slurm.local import rank_command, rank_environment

STOPPED = 2
FLOOR = 6


def test_a_stopped_rank_is_named_with_where_it_stood_and_all_end(workdir: Path) -> None:
    overrides = ["train.steps=100000", "checkpoint.every=100000", f"control.hang_floor_seconds={FLOOR}"]
    training = subprocess.Popen(
        rank_command(4, [sys.executable, "-m", "rookery", "train", "test.yaml", *overrides]),
        cwd=workdir,
        env=rank_environment(4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    attempt = workdir / "run/attempts/0001"
    try:
        deadline = time.monotonic() + 120
        while not (attempt.is_dir() and len(read_attempt(workdir / "run", 1)) > 10):  # the cost of a step is known
            assert time.monotonic() < deadline
            time.sleep(0.1)
        pids = [rank["pid"] for rank in json.loads((attempt / "environment.json").read_text())["ranks"]]
        os.kill(pids[STOPPED], signal.SIGSTOP)
        stopped = time.monotonic()
        _, errors = training.communicate(timeout=60)
        assert time.monotonic() - stopped < FLOOR + 25
    finally:
        training.kill()
    assert training.returncode not in (0, 10, 11, 12, 13)
    outcome, hang = read_outcome(workdir / "run", 1), json.loads((attempt / "hang.json").read_text())
    assert outcome is not None
    assert outcome["exit_code"] == 1
    assert f"rank {STOPPED} on {hang['ranks'][0]['host']} (stopped by a signal) stands in" in outcome["reason"]
    assert outcome["reason"] in errors
    assert [rank["rank"] for rank in hang["stalled"]] == [STOPPED]
    assert [rank["rank"] for rank in hang["ranks"]] == [0, 1, 2, 3]
    assert {rank["step"] for rank in hang["ranks"]} <= {(step := hang["ranks"][STOPPED]["step"]), step + 1}
    waiting = [rank for rank in hang["ranks"] if rank["rank"] != STOPPED]
    assert all(rank["inside"] and rank["collective"] for rank in waiting)
    assert "most recent call first" in (attempt / "hang/rank-00000.txt").read_text()
    crash = read_crash_report(workdir / "run", 1)
    assert crash is not None
    assert (crash["class"], crash["rank"]) == ("hang", STOPPED)
    assert {last["step"] for last in crash["last_steps"].values()} == {rank["step"] for rank in hang["ranks"]}
    while any(process_state(pid) not in ("", "Z") for pid in pids):  # the launcher does not wait for them
        assert time.monotonic() - stopped < FLOOR + 30
        time.sleep(0.1)


def rank_record(rank: int, *, number: int = 7, inside: bool = True, state: str = "S") -> dict[str, object]:
    return {"rank": rank, "number": number, "inside": inside, "state": state}


@pytest.mark.parametrize(
    ("odd", "stalled"),
    [
        (rank_record(1, state="T"), [1]),
        (rank_record(1, number=6, inside=False), [1]),
        (rank_record(1, inside=False), [1]),
        (rank_record(1), []),
    ],
)
def test_those_are_stalled_whom_the_others_wait_for(odd: dict[str, object], stalled: list[int]) -> None:
    found = find_stalled([rank_record(0), odd, rank_record(2)])
    assert [record["rank"] for record in found] == stalled


def test_a_limit_that_is_kept_ends_nothing(tmp_path: Path) -> None:
    config = ControlConfig(hang_floor_seconds=0.1, hang_start_minutes=0.1)
    with Watchdog(config, World(), Journal(), tmp_path) as watchdog:
        for _ in range(3):
            with watchdog.step(1, 4.0, 2.0):
                time.sleep(0.01)
        time.sleep(2.5)  # nothing to watch
    assert {path.name for path in tmp_path.iterdir()} == {"heartbeat.json", "nodes"}


def test_a_node_tells_where_its_ranks_stand_without_a_watchdog_too(tmp_path: Path) -> None:
    journal, host = Journal(), socket.gethostname()
    watchdog = Watchdog(ControlConfig(watchdog=False), World(), journal, tmp_path)
    with journal.phase("step", 7), journal.phase("forward"), watchdog, watchdog.limit(0.0):
        deadline = time.monotonic() + 30.0  # the first is left at once
        while not (tmp_path / f"nodes/{host}.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        beat = json.loads((tmp_path / f"nodes/{host}.json").read_text())
        assert (beat["host"], beat["ranks"]) == (host, {"0": {"step": 7, "phase": "forward", "state": "R"}})
        assert watchdog.expected(1, 4.0, 2.0) is None
    ended = json.loads((tmp_path / f"nodes/{host}.json").read_text())
    assert ended["time"] > beat["time"]


def test_a_journal_tells_phase_collective_and_traffic() -> None:
    journal = Journal()
    journal.share(World())
    with journal.phase("step", 3):
        with journal.phase("forward"), journal.collective("all_reduce", 8, "node"):
            assert journal.standing().inside
        assert (journal.standing().step, journal.standing().phase, journal.standing().inside) == (3, "step", False)
    with pytest.raises(ZeroDivisionError), journal.phase("step"), journal.phase("backward"):
        raise ZeroDivisionError
    assert journal.failed_in == "backward"
    traffic = journal.traffic()["node"]
    assert traffic == Traffic(count=1, bytes=8, seconds=traffic.seconds)


@given(st.tuples(*[st.floats(0.0, 10.0)] * 3), st.integers(0, 2**32 - 1))
def test_the_cost_of_a_depth_is_learnt_from_other_depths(true: tuple[float, float, float], seed: int) -> None:
    steps = np.random.default_rng(seed).integers(1, 40, (20, 2))
    cost = StepCost()
    for n, k in steps:
        cost.add(2, n, k, float(np.dot(true, (2, n, k))))
    expected = float(np.dot(true, (2, 64, 8)))
    assert cost.seconds(2, 64, 8) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@given(st.integers(0, 2**32 - 1))
def test_no_other_non_negative_solution_is_nearer(seed: int) -> None:
    generator = np.random.default_rng(seed)
    columns, target = generator.normal(size=(12, 3)), generator.normal(size=12)
    found = non_negative_least_squares(columns, target)
    assert (found >= 0.0).all()
    for other in np.abs(found + 0.1 * generator.normal(size=(50, 3))):
        assert np.linalg.norm(columns @ found - target) <= np.linalg.norm(columns @ other - target) + 1e-9
