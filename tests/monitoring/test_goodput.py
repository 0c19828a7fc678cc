"""The ledger tells all of the time that a run had, each second once."""

import json
import math
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.goodput import Ledger, LedgerReader
from monitoring.reading.launches import launch_of, read_jobs
from monitoring.runlog import RunLog
from tests.monitoring.plain_branches import branches

NOW = 1_800_000_000.0
_ATTEMPTS = st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=4)


class Launch(NamedTuple):
    """What happens in a launch, in whole seconds."""

    before: int  # from the job's beginning, or the last launch's end, to the start of the ranks
    load: int  # until the first step
    back: int  # steps that it goes back behind the newest one
    steps: list[tuple[int, int, int, bool]]  # seconds of step, validation, checkpoint; whether the update was vetoed
    code: int | None  # of the outcome, None if the ranks are killed
    save: int  # from the last step and its validation to the outcome, or to the death
    after: int  # until the launch is over
    rollback: int | None = None  # steps that it goes back in its middle


_SECONDS = st.integers(0, 30)
_LAUNCHES = st.builds(
    Launch, _SECONDS, _SECONDS, st.integers(0, 4),
    st.lists(st.tuples(st.integers(1, 20), _SECONDS, _SECONDS, st.booleans()), max_size=6),
    st.sampled_from([0, 10, 1, None]), _SECONDS, _SECONDS, st.none() | st.integers(1, 3),
)  # fmt: skip
_CHAINS = st.lists(st.tuples(st.lists(_LAUNCHES, min_size=1, max_size=3), _SECONDS), max_size=3)


class Chain:
    """Plays jobs into a run directory, and counts by itself where the time goes."""

    def __init__(self, run: Path) -> None:
        self.run, self.now, self.attempt = run, NOW, 0
        self.steps: list[tuple[int, int]] = []
        self.parts: Counter[str] = Counter()
        self.allocated = 0.0
        for name in ("attempts", "metrics"):
            (run / name).mkdir(parents=True)

    def play(self, chain: list[tuple[list[Launch], int]]) -> None:
        for number, (launches, idle) in enumerate(chain):
            self.now += 1000  # in the queue
            began = self.now
            self.note("began", job=str(number))
            for place, launch in enumerate(launches):
                self.launch(str(number), place, launch)
            self.spend("idle", idle)
            self.note("requeued", job=str(number))
            self.allocated += self.now - began

    def launch(self, job: str, number: int, plan: Launch) -> None:
        self.spend("start_up", plan.before)
        self.note("launched", job=job, launch=number, attempts=self.attempt, log="jobs/1/1", nodes=["n1"])
        self.attempt += 1
        folder = self.run / f"attempts/{self.attempt:04d}"
        folder.mkdir()
        self.go_back(plan.back)
        self.write("events.jsonl", time=self.now, kind="start", attempt=self.attempt, step=len(self.steps))
        self.spend("start_up", plan.load)
        died, checkpoint = self.now, 0
        for place, (seconds, validation, saved, vetoed) in enumerate(plan.steps):
            if plan.rollback and place and place == len(plan.steps) // 2 and self.go_back(plan.rollback):
                self.spend("start_up", 7)
            self.now += seconds
            self.steps.append((len(self.steps) + 1, 0 if vetoed else seconds))
            self.parts["lost"] += seconds if vetoed else 0
            record: dict[str, Any] = {"step": len(self.steps), "time": self.now, "seconds": seconds, "loss": 2.0}
            record["phases"] = {"forward": 0.1, "validation": validation, "checkpoint": checkpoint}
            self.write(f"metrics/{self.attempt:04d}.jsonl", **record, **({"skipped": True} if vetoed else {}))
            died = self.now
            self.spend("evaluation", validation)
            if place < len(plan.steps) - 1:
                self.spend("checkpoint", checkpoint := saved)
        clean = plan.code in (0, 10)
        self.spend(("checkpoint" if plan.steps else "start_up") if clean or not plan.steps else "lost", plan.save)
        if plan.code is None:
            heartbeat = {"time": max(self.now, died), "step": 1, "phase": "save"}
            (folder / "heartbeat.json").write_text(json.dumps(heartbeat))
        else:
            outcome = {"exit_code": plan.code, "reason": "why", "time": self.now}
            (folder / "outcome.json").write_text(json.dumps(outcome))
        self.spend("idle" if clean and plan.steps else "lost", plan.after)
        self.note("ended", job=job, launch=number, attempt=self.attempt, status=1, code=plan.code, reason="")

    def go_back(self, steps: int) -> bool:
        gone = self.steps[max(0, len(self.steps) - steps) :]
        del self.steps[len(self.steps) - len(gone) :]
        self.parts["replayed"] += sum(seconds for _, seconds in gone)
        return bool(gone)

    def spend(self, part: str, seconds: int) -> None:
        self.now += seconds
        self.parts[part] += seconds

    def note(self, kind: str, **fields: Any) -> None:
        self.write("jobs.jsonl", time=self.now, kind=kind, **fields)

    def write(self, name: str, **record: Any) -> None:
        with (self.run / name).open("a") as file:
            file.write(json.dumps(record) + "\n")


@given(_CHAINS)
@settings(max_examples=60)
def test_every_second_of_a_chain_of_jobs_is_in_one_part(jobs: list[tuple[list[Launch], int]]) -> None:
    with TemporaryDirectory() as folder:
        chain = Chain(Path(folder))
        reader = LedgerReader(Path(folder))
        for job in jobs:
            chain.play([job])
            assert reader.read(chain.now + 1e6) == LedgerReader(Path(folder)).read(chain.now + 1e6)
        found = reader.read(chain.now + 1e6)
    productive = sum(seconds for _, seconds in chain.steps)
    assert found == Ledger(productive=productive, **{name: float(seconds) for name, seconds in chain.parts.items()})
    assert found.total == chain.allocated == sum(chain.parts.values()) + productive
    assert found.share == (productive / chain.allocated if chain.allocated else None)


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 9), st.floats(-1e10, 1e10), st.floats(-9, 1e6)), max_size=8), max_size=3)
)
def test_clocks_that_jump_make_no_part_negative(attempts: list[list[tuple[int, float, float]]]) -> None:
    with TemporaryDirectory() as folder:
        chain = Chain(Path(folder))
        for number, steps in enumerate(attempts, start=1):
            chain.note("launched", job="7", launch=number, attempts=number - 1, log="", nodes=[])
            for step, time, seconds in steps:
                chain.write(f"metrics/{number:04d}.jsonl", step=step, time=time, seconds=seconds)
            chain.now -= 5000.0
            chain.note("ended", job="7", launch=number, attempt=number, code=None)
        found = LedgerReader(Path(folder)).read(NOW)
    parts = [value for name, value in found.to_dict().items() if name not in ("total", "share")]
    assert all(part is not None and part >= 0.0 for part in parts)
    assert found.total == math.fsum(part for part in parts if part is not None)


@given(_ATTEMPTS)
@settings(max_examples=40)
def test_it_counts_the_steps_that_the_run_stands_on(attempts: list[list[int]]) -> None:
    with TemporaryDirectory() as folder:
        chain = Chain(Path(folder))
        for number, steps in enumerate(attempts, start=1):
            for place, step in enumerate(steps):
                chain.write(f"metrics/{number:04d}.jsonl", step=step, seconds=2.0 ** -(number * 12 + place))
        found, split = LedgerReader(Path(folder)).read(NOW), branches(Path(folder))
    assert found.productive == sum(record["seconds"] for record in split.current)  # powers of two: each step shows
    assert found.replayed == sum(record["seconds"] for record in split.abandoned)


def test_a_run_started_by_hand_counts_from_its_first_sign_to_its_last(tmp_path: Path) -> None:
    log = RunLog.open(tmp_path)
    log.event("start", step=0)
    log.close()
    begun = json.loads((tmp_path / "events.jsonl").read_text())["time"]
    chain = begun + 40.0
    for step in (1, 2):
        line = json.dumps({"step": step, "time": chain + 10.0 * step, "seconds": 10.0})
        with (tmp_path / "metrics/0001.jsonl").open("a") as file:
            file.write(line + "\n")
    beat = {"time": chain + 24.0, "step": 2, "phase": "forward"}
    (tmp_path / "attempts/0001/heartbeat.json").write_text(json.dumps(beat))
    killed = LedgerReader(tmp_path).read(chain + 5000.0)
    assert killed.to_dict() == pytest.approx(Ledger(productive=20.0, start_up=40.0, lost=4.0).to_dict(), abs=1e-5)
    # While it runs the step that it is at is neither lost nor done, whoever knows that it runs.
    assert (
        LedgerReader(tmp_path).read(chain + 30.0).lost
        == LedgerReader(tmp_path).read(chain + 5000.0, running=True).lost
        == 0.0
    )
    RunLog.open(tmp_path).event("start", step=1)  # it has gone back, and done nothing yet
    assert (LedgerReader(tmp_path).read().productive, LedgerReader(tmp_path).read().replayed) == (10.0, 10.0)


def test_a_start_that_hangs_is_start_up(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    chain.note("began", job="7")
    chain.now += 5
    chain.note("launched", job="7", launch=1, attempts=0, log="", nodes=[])
    chain.now += 300
    chain.note("ended", job="7", launch=1, attempt=None, code=None)
    # One that somebody starts later by hand is not of that launch.
    (tmp_path / "attempts/0001").mkdir()
    chain.write("metrics/0001.jsonl", step=1, time=chain.now + 1000.0, seconds=10.0)
    assert launch_of(read_jobs(tmp_path), 1) is None
    assert LedgerReader(tmp_path).read(NOW + 1e6) == Ledger(start_up=305.0, productive=10.0)


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    lines = ['{"step":1,"seconds":1.5}', '{"step":2,"sec', "", "[]", '{"step":1e400,"seconds":1}', '{"step":2e30}']
    lines += ['"' + "x" * (1 << 21), '{"step":2,"seconds":0.25}', '{"step":3,"seco']
    (tmp_path / "metrics/0001.jsonl").write_text("\n".join(lines))
    (tmp_path / "jobs.jsonl").write_text(
        '{"kind":"began"}\n{"kind":"ended","time":"now"}\n{"kind":"launched","time":5}\n'
    )
    assert LedgerReader(tmp_path).read().productive == pytest.approx(1.75)


def test_a_reader_with_a_budget_comes_to_the_same(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    text = "".join(json.dumps({"step": step, "seconds": 1.0, "pad": "x" * 1000}) + "\n" for step in range(1, 20_001))
    (tmp_path / "metrics/0001.jsonl").write_text(text)
    reader = LedgerReader(chain.run)
    assert 0.0 < reader.read(budget=1).productive < 20_000.0
    assert reader.behind
    assert reader.read().productive == 20_000.0
    assert not reader.behind
