"""Reads a run directory, at once for a report or piece by piece for a page that follows it."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from monitoring.crashes.report import crash_report, read_crash_report
from monitoring.goodput import Ledger, LedgerReader
from monitoring.reading.columns import as_floats
from monitoring.reading.run_config import beyond_plan, planned_steps, read_config, require_run
from monitoring.reading.run_table import Progress, RunTable
from monitoring.reading.runview import ENDINGS, Attempt, Evaluation, Recurrence, RunView, finite, number
from monitoring.runlog import EventsFollower, Record, RunLogError, attempts, read_outcome

MOST_EVENTS = 20_000
"""Newest events kept."""


class RunReader:
    """Follows a run.

    Args:
        run_dir: the run's directory.
        name: label; the directory's name if None.

    Raises:
        RunLogError: there is no such directory, or it is not that of a run.
    """

    def __init__(self, run_dir: Path, name: str | None = None) -> None:
        require_run(run_dir)
        self.run_dir = run_dir
        self.table = RunTable(run_dir)
        self._name = run_dir.resolve().name if name is None else name
        self._follower = EventsFollower(run_dir / "events.jsonl")
        self._events: deque[Record] = deque(maxlen=MOST_EVENTS)
        self._attempts: dict[int, Record | None] = {}
        self._crashes: dict[int, Record | None] = {}
        self._evaluations: dict[str, tuple[int, Evaluation | None]] = {}
        self._ledger_reader = LedgerReader(run_dir)
        self._ledger: Ledger | None = None

    def poll(self, budget: int = 8 << 20) -> Progress:
        """Read what is new: of the step records at most about `budget` bytes, oldest first; of all else everything."""
        progress = self.table.poll(budget)
        self._ledger = self._read_ledger(time.time(), budget)
        events = self._follower.poll()
        self._events.extend(events)
        changed = [progress.changed, bool(events), self._poll_attempts(), self._poll_evaluations()]
        return progress._replace(changed=any(changed))

    def view(self, now: float | None = None) -> RunView:
        """Return the run as far as it is read.

        Args:
            now: given for a page that follows the run: the ledger is as of the last poll, and nothing is read. None
                for the ledger as of the run's newest sign of life, which makes reports of the same files the same.
        """
        ledger = self._read_ledger(self._newest_sign()) if now is None else self._ledger
        config, problem = read_config(self.run_dir)
        return RunView(
            name=self._name,
            table=self.table,
            evaluations=self._all_evaluations(),
            attempts=self._described_attempts(),
            events=list(self._events),
            crashes=[report for _, report in sorted(self._crashes.items()) if report],
            ledger=ledger,
            config=config,
            warnings=[*([] if problem is None else [problem]), *self._warnings(planned_steps(config))],
        )

    def _poll_attempts(self) -> bool:
        numbers = attempts(self.run_dir)
        before = (dict(self._attempts), dict(self._crashes))
        for attempt in numbers:
            if self._attempts.get(attempt) is None:
                self._attempts[attempt] = read_outcome(self.run_dir, attempt)
            if self._crashes.get(attempt) is None and self._ended_badly(attempt, numbers[-1]):
                self._crashes[attempt] = read_crash_report(self.run_dir, attempt)
                if self._crashes[attempt] is None and attempt not in before[1]:
                    with suppress(OSError):
                        self._crashes[attempt] = crash_report(self.run_dir, attempt)
        return before != (self._attempts, self._crashes)

    def _ended_badly(self, attempt: int, newest: int) -> bool:
        outcome = self._attempts.get(attempt)
        return attempt != newest if outcome is None else outcome.get("exit_code") not in (0, 10)

    def _poll_evaluations(self) -> bool:
        changed = False
        for path in (self.run_dir / "eval").glob("step-*.json"):
            with suppress(OSError):
                stamp = path.stat().st_mtime_ns
                if self._evaluations.get(path.name, (0, None))[0] != stamp:
                    self._evaluations[path.name] = (stamp, _read_evaluation(path))
                    changed = True
        return changed

    def _read_ledger(self, now: float, budget: int | None = None) -> Ledger | None:
        try:
            return self._ledger_reader.read(now, budget=budget)
        except OSError:
            return None

    def _newest_sign(self) -> float:
        outcomes = [outcome for outcome in self._attempts.values() if outcome]
        times = [number(record, "time") for record in (self.table.newest, *list(self._events)[-1:], *outcomes)]
        return max((seconds for seconds in times if seconds is not None), default=0.0)

    def _all_evaluations(self) -> list[Evaluation]:
        """Validations of step records among them; an evaluation of the same step counts more, since it read more."""
        found = {e.step: e for e in self._validations()}
        found |= {e.step: e for _, e in self._evaluations.values() if e is not None}
        return [found[step] for step in sorted(found)]

    def _validations(self) -> list[Evaluation]:
        samples = self.table.samples("validation")
        current, steps, tokens = self.table.current, self.table.column("step"), self.table.column("tokens")
        return [
            Evaluation(int(steps[row]), finite(tokens[row]), losses, None, None, None)
            for row, value in zip(samples.rows, samples.values, strict=True)
            if current[row] and (losses := _by_depth(value))
        ]

    def _described_attempts(self) -> list[Attempt]:
        numbers = self.table.column("attempt")
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        step = self.table.column("step")
        parts = np.split(step, starts[1:]) if len(starts) else []
        spans = {int(numbers[at]): (int(s.min()), int(s.max())) for at, s in zip(starts, parts, strict=True)}
        newest = max(self._attempts, default=0)
        return [
            _describe(attempt, spans.get(attempt), outcome, attempt == newest)
            for attempt, outcome in sorted(self._attempts.items())
        ]

    def _warnings(self, planned: int | None) -> list[str]:
        names = sorted(name for name, (_, evaluation) in self._evaluations.items() if evaluation is None)
        said = [f"eval/{name} cannot be read as an evaluation" for name in names]
        if left_out := self.table.left_out:
            said.append(f"a very long run: {left_out:,} step records left out of the plots, their extremes kept")
        newest = self.table.newest.get("step")
        return [*said, *beyond_plan(newest, planned), *self._ledger_reader.warnings()]


def read_runs(run_dirs: Iterable[Path]) -> list[RunView]:
    """Read runs to be shown together.

    Raises:
        RunLogError: a directory is missing, or the same one is named twice.
    """
    paths = [run_dir.resolve() for run_dir in run_dirs]
    for path in paths:
        if paths.count(path) > 1:
            raise RunLogError(f"run directory {path} is named twice: name every run once")
    readers = [RunReader(path, name) for path, name in zip(paths, _labels(paths), strict=True)]
    for reader in readers:
        while reader.poll(64 << 20).changed:
            pass
    return [reader.view() for reader in readers]


def _labels(paths: list[Path]) -> list[str]:
    """Shortest path endings that tell the runs apart: usually their directory names."""
    longest = max((len(path.parts) for path in paths), default=1)
    for length in range(1, longest + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _describe(attempt: int, steps: tuple[int, int] | None, outcome: Record | None, newest: bool) -> Attempt:
    if outcome is None:
        return Attempt(attempt, steps, None, "still running, or killed" if newest else "killed")
    code = outcome.get("exit_code")
    code = code if isinstance(code, int) else None
    word = "ended without an exit code" if code is None else ENDINGS.get(code, f"crashed with exit code {code}")
    reason = outcome.get("reason")
    return Attempt(attempt, steps, code, f"{word}: {reason}" if reason else word)


def _read_evaluation(path: Path) -> Evaluation | None:
    try:
        content = json.loads(path.read_bytes())
        return Evaluation(
            step=int(content["step"]),
            tokens=number(content, "tokens"),
            loss=_by_depth(content["loss"]),
            unigram_entropy=number(content, "unigram_entropy"),
            mean_recurrence=number(content, "mean_recurrence"),
            recurrence=_recurrence(content),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _by_depth(losses: dict[str, Any]) -> dict[int, float]:
    """Return finite losses by depth, ascending; what is no depth is left out."""
    found = {int(r): finite(loss) for r, loss in losses.items() if str(r).isdecimal()}
    return {r: loss for r, loss in sorted(found.items()) if loss is not None}


def _recurrence(content: Record) -> Recurrence | None:
    norms, residuals = (content.get(field) for field in ("state_rms", "relative_residual"))
    norms, residuals = (as_floats(values if isinstance(values, list) else []) for values in (norms, residuals))
    return Recurrence(int(content["step"]), "evaluation", norms, residuals) if len(norms) or len(residuals) else None
