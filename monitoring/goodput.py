"""Where the time went that a run had: a ledger over all of its jobs and attempts, from the run directory alone."""

from __future__ import annotations

import json
import math
import time as clock
from array import array
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from monitoring.reading.launches import Job, Launch, launch_of, read_jobs
from monitoring.reading.lines import LineReader
from monitoring.reading.oddities import Oddities, missing, unreadable
from monitoring.reading.step_records import step_record
from monitoring.runlog import EventsFollower, Record, attempts, read_outcome

PARTS = {
    "productive": "productive",
    "replayed": "replayed",
    "checkpoint": "checkpoints",
    "start_up": "start-up",
    "evaluation": "evaluation",
    "idle": "idle",
    "lost": "lost",
}
"""The parts of a ledger in words, in the order in which they are shown."""

SILENT_SECONDS = 60.0
"""Age of its last sign of life at which an attempt is taken for dead, where nobody knows better."""

_CLEAN = (0, 10)
_CHUNK = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Seconds of the time that a run had: from the beginning of its jobs to their end, all nodes as one.

    Attributes:
        productive: steps that the run stands on.
        replayed: steps that a later attempt or a rollback has superseded.
        checkpoint: time in which the steps waited for a checkpoint.
        start_up: from the beginning of a job, or from a rollback, to the first step.
        evaluation: validations.
        idle: between the end of the ranks and that of their job, jobs whose nodes were not used, gaps between steps.
        lost: from the last step to the end of a launch that failed, and steps whose update was vetoed.
    """

    productive: float = 0.0
    replayed: float = 0.0
    checkpoint: float = 0.0
    start_up: float = 0.0
    evaluation: float = 0.0
    idle: float = 0.0
    lost: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return math.fsum(asdict(self).values())

    @property
    def share(self) -> float | None:
        """Goodput: the productive part of the total; None before there was any time."""
        total = self.total
        return self.productive / total if total > 0.0 else None

    def to_dict(self) -> dict[str, float | None]:
        """Return the parts, `total` and `share`."""
        return {**asdict(self), "total": self.total, "share": self.share}


class LedgerReader:
    """Gives the ledger again and again, of a run that goes on: only what is new in the log is read.

    Args:
        run_dir: the run directory.

    Attributes:
        behind: whether the last reading left something unread, for its budget.
    """

    def __init__(self, run_dir: Path) -> None:
        self.behind = False
        self._run_dir = run_dir
        self._events = EventsFollower(run_dir / "events.jsonl")
        self._starts: dict[int, Record] = {}
        self._branch = _Branch()
        self._attempts: dict[int, _Attempt] = {}
        self._oddities = Oddities()

    def warnings(self) -> list[str]:
        """Return what of the log was damaged, missing or odd as far as it is read, in words."""
        numbers, said = sorted(self._attempts), []
        readers = [attempt.lines for attempt in self._attempts.values()]
        if damaged := self._oddities.damaged + self._events.damaged:
            said.append(f"{damaged:,} unreadable line{'s' * (damaged > 1)} in the log skipped")
        if long := sum(reader.too_long for reader in readers) + self._events.too_long:
            said.append(f"{long:,} line{'s' * (long > 1)} of over a megabyte in the log skipped")
        problems = [(self._events.path, self._events.problem), *((reader.path, reader.problem) for reader in readers)]
        said += unreadable(self._run_dir, problems)
        said += missing(self._run_dir, numbers, stepped=any(each.last is not None for each in self._attempts.values()))
        return said + self._oddities.warnings()

    def read(self, now: float | None = None, *, running: bool | None = None, budget: int | None = None) -> Ledger:
        """Return the seconds of all launches so far, by what they went to.

        Args:
            now: unix seconds to look from; None for this moment.
            running: whether the newest attempt runs; None to believe its last sign of life.
            budget: about how many bytes of step records to read at most; what is left is read by later calls.

        Raises:
            RunLogError: there is no such run directory.
        """
        now = clock.time() if now is None else now
        numbers = attempts(self._run_dir)
        self._follow(numbers, math.inf if budget is None else budget)
        jobs = read_jobs(self._run_dir)
        lives = {number: self._life(number, jobs) for number in numbers}
        if lives and (newest := lives[numbers[-1]]).open:
            newest.runs = now - newest.sign < SILENT_SECONDS if running is None else running
        count = _Count(now)
        launched = {id(life.launch): life for life in lives.values()}
        for job in jobs:
            count.job(job, [(launch, launched.get(id(launch))) for launch in job.launches])
        for life in lives.values():
            if life.launch is None:
                count.launch(life.began, life.sign, life)
        return count.ledger(self._branch, [self._attempts[number] for number in numbers])

    def _follow(self, numbers: list[int], budget: float) -> None:
        """Read what is new, older attempts first: they are superseded by newer ones, and not the other way round."""
        for event in self._events.poll():
            if event["kind"] == "start" and isinstance(event.get("attempt"), int):
                self._starts.setdefault(event["attempt"], event)
        for number in numbers:
            if number not in self._attempts:
                path = self._run_dir / "metrics" / f"{number:04d}.jsonl"
                self._attempts[number] = _Attempt(number, path, self._oddities)
        for number in numbers:
            attempt = self._attempts[number]
            if number in self._starts and not attempt.placed:
                attempt.placed = True
                self._branch.go_back(self._starts[number].get("step"))
            budget = attempt.follow(self._branch, budget)
            self.behind = budget <= 0
            if self.behind:
                return

    def _life(self, number: int, jobs: list[Job]) -> _Life:
        folder, attempt = self._run_dir / "attempts" / f"{number:04d}", self._attempts[number]
        outcome, launch = read_outcome(self._run_dir, number), launch_of(jobs, number)
        started = _number(self._starts.get(number, {}).get("time"))
        # The files of a run that was copied have the time of the copy: what is written in them counts more.
        began = next((time for time in (started, attempt.first) if time is not None), None) or _modified(folder)
        signs = [attempt.last, _number((outcome or {}).get("time")), _heartbeat(folder), began]
        return _Life(attempt, outcome, launch, began, max(sign for sign in signs if sign is not None))


class _Branch:
    """The steps that the run stands on, and the seconds of all others: 16 bytes a step."""

    def __init__(self) -> None:
        self._steps, self._seconds = array("q"), array("d")
        self.replayed = 0.0

    @property
    def productive(self) -> float:
        return math.fsum(self._seconds)

    def go_back(self, step: Any) -> bool:
        """Take back all steps after `step`; return whether there were any."""
        went = False
        while isinstance(step, int) and self._steps and self._steps[-1] > step:
            self._steps.pop()
            self.replayed += self._seconds.pop()
            went = True
        return went

    def add(self, step: int, seconds: float) -> None:
        self._steps.append(step)
        self._seconds.append(seconds)


class _Attempt:
    """What the step records of one attempt say of its time.

    Attributes:
        placed: whether the event of its start has been taken into account.
        lines: the file of them.
        first: when its first step began, None without one.
        last: when its newest step ended, by a clock that is not set back.
        validation: seconds of the validation after that.
        parts: seconds of checkpoint, start_up, evaluation, idle and lost between its steps and of vetoed ones.
    """

    def __init__(self, number: int, path: Path, oddities: Oddities) -> None:
        self.lines = LineReader(path)
        self._number, self._oddities = number, oddities
        self.placed = False
        self.first: float | None = None
        self.last: float | None = None
        self.validation = 0.0
        self.parts = dict.fromkeys(("checkpoint", "start_up", "evaluation", "idle", "lost"), 0.0)

    def follow(self, branch: _Branch, budget: float) -> float:
        """Read what is new, about `budget` bytes of it; return what is left of that."""
        before = -1
        while budget > 0 and self.lines.offset != before:
            before = self.lines.offset
            for line in self.lines.read(_CHUNK):
                if (record := step_record(line)) is not None:
                    self._take(record, branch)
                elif line.strip():
                    self._oddities.damaged += 1
            budget -= self.lines.offset - before
        return budget

    def _take(self, record: Record, branch: _Branch) -> None:
        step, seconds = record["step"], _length(record.get("seconds"))
        time, phases = _number(record.get("time")), record.get("phases")
        self._oddities.take(self._number, record, time)
        phases = phases if isinstance(phases, dict) else {}
        went_back = branch.go_back(step - 1)
        skipped = record.get("skipped") is True
        branch.add(step, 0.0 if skipped else seconds)
        self.parts["lost"] += seconds if skipped else 0.0
        if time is not None:
            if self.last is not None:
                # A clock that was set back makes a gap negative; steps are measured by one that nobody sets, and until
                # the clock has made up for it they say what the time is.
                self._pass(max(0.0, time - seconds - self.last), phases, loaded=went_back)
                time = time if time >= self.last else self.last + seconds
            self.first = time - seconds if self.first is None else self.first
            self.last = time
        self.validation = _length(phases.get("validation", 0.0))

    def _pass(self, gap: float, phases: Record, *, loaded: bool) -> None:
        """Account for the time between two steps: the validation after the one, then checkpoint or rollback."""
        evaluation = min(gap, self.validation)
        checkpoint = min(gap - evaluation, _length(phases.get("checkpoint", 0.0)))
        self.parts["evaluation"] += evaluation
        self.parts["checkpoint"] += checkpoint
        self.parts["start_up" if loaded else "idle"] += gap - evaluation - checkpoint


@dataclass
class _Life:
    """An attempt, and who began it.

    Attributes:
        attempt: what its records say.
        outcome: how it ended, None if it left none.
        launch: of a job, None if it was started by hand.
        began: its first sign.
        sign: its last sign of life.
        runs: whether it does.
    """

    attempt: _Attempt
    outcome: Record | None
    launch: Launch | None
    began: float
    sign: float
    runs: bool = False

    @property
    def open(self) -> bool:
        """Whether nothing says that it has ended."""
        return self.outcome is None and (self.launch is None or self.launch.ended is None)


class _Count:
    """Adds up the time of jobs and attempts, in which the steps lie."""

    def __init__(self, now: float) -> None:
        self._now = now
        self._parts = dict.fromkeys(("checkpoint", "start_up", "evaluation", "idle", "lost"), 0.0)

    def job(self, job: Job, launches: list[tuple[Launch, _Life | None]]) -> None:
        """Count the time of a job: its launches, each with its attempt, and what is around them."""
        end = job.began
        for launch, life in launches:
            self._add("start_up", end, launch.began)
            end = self.launch(launch.began, launch.ended, life)
        if not any(life is not None and life.runs for _, life in launches):
            self._add("idle", end, job.last)

    def launch(self, began: float, ended: float | None, life: _Life | None) -> float:
        """Count what is around the steps of a launch, or of an attempt started by hand; return when it was over."""
        if life is None:  # its ranks began no attempt
            self._add("start_up", began, ended)
            return began if ended is None else ended
        last = life.attempt.last
        end = life.sign if ended is None else ended
        if life.runs:  # what it is at now is not over
            self._add("start_up", began, self._now if last is None else life.attempt.first)
            return self._now if last is None else last
        if last is None:
            self._add("start_up", began, min(life.sign, end))
            self._add("lost", min(life.sign, end), end)
            return end
        self._add("start_up", began, life.attempt.first)
        self._tail(last, end, life)
        return max(last, end)

    def _tail(self, last: float, end: float, life: _Life) -> None:
        """Count what is between the newest step of an attempt and the end of its launch."""
        validated = last + max(0.0, min(life.attempt.validation, end - last))
        self._add("evaluation", last, validated)
        outcome = life.outcome or {}
        if outcome.get("exit_code") not in _CLEAN:
            self._add("lost", validated, end)
            return
        said = _number(outcome.get("time"))
        saved = validated if said is None else max(validated, min(said, end))
        self._add("checkpoint", validated, saved)  # the last one is waited for
        self._add("idle", saved, end)

    def _add(self, part: str, begin: float, end: float | None) -> None:
        if end is not None:
            self._parts[part] += max(0.0, end - begin)  # the clocks of two nodes may differ

    def ledger(self, branch: _Branch, read: list[_Attempt]) -> Ledger:
        parts = {
            name: math.fsum([own, *(attempt.parts[name] for attempt in read)]) for name, own in self._parts.items()
        }
        return Ledger(productive=branch.productive, replayed=branch.replayed, **parts)


def _heartbeat(folder: Path) -> float | None:
    with suppress(OSError, ValueError, AttributeError):
        return _number(json.loads((folder / "heartbeat.json").read_bytes()).get("time"))
    return None


def _modified(folder: Path) -> float:
    with suppress(OSError):
        return folder.stat().st_mtime
    return 0.0


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _length(value: Any) -> float:
    return max(0.0, _number(value) or 0.0)
