"""One run as the report shows it: everything a run directory holds, read once, whatever is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitoring.runlog import EventsFollower, Record, RunLogError, attempts, branches, read_outcome

ENDINGS = {
    0: "finished",
    10: "stopped with a checkpoint, to be continued",
    11: "gave up: the run diverged",
    12: "refused its input",
    13: "stopped: unhealthy node",
}
"""The exit codes of docs/architecture.md in words."""


@dataclass(frozen=True)
class Attempt:
    """One launch of the run.

    Attributes:
        number: from 1.
        steps: (first, last) completed step that it logged, or None.
        exit_code: of its outcome, or None without one.
        ending: how it ended, in words.
    """

    number: int
    steps: tuple[int, int] | None
    exit_code: int | None
    ending: str


@dataclass(frozen=True)
class Recurrence:
    """State of the recurrence by iteration, at one step.

    Attributes:
        step: completed optimizer steps.
        source: "evaluation" or "training probe".
        state_rms: root mean square of the state after iteration 1, 2, ...; None where it was not finite.
        relative_residual: mean of |s_i - s_(i-1)| / |s_i|, same indices.
    """

    step: int
    source: str
    state_rms: list[float | None]
    relative_residual: list[float | None]


@dataclass(frozen=True)
class Evaluation:
    """Validation losses at several depths, at one step.

    Attributes:
        step: completed optimizer steps.
        tokens: tokens seen by then.
        loss: nats per token, by depth r (core iterations), ascending.
        unigram_entropy: nats; the loss of a model that knows token frequencies only.
        mean_recurrence: mean depth of training.
        recurrence: state by iteration, if it was taken.
    """

    step: int
    tokens: float | None
    loss: dict[int, float]
    unigram_entropy: float | None
    mean_recurrence: float | None
    recurrence: Recurrence | None


@dataclass(frozen=True)
class RunView:
    """A run, read.

    Attributes:
        name: label, unique among the runs shown together.
        current: step records that the run stands on, by step.
        abandoned: superseded step records.
        evaluations: by step.
        attempts: by number.
        events: in the order written.
        config: text of run.yaml, empty if there is none.
        warnings: what could not be read, in words.
    """

    name: str
    current: list[Record]
    abandoned: list[Record]
    evaluations: list[Evaluation]
    attempts: list[Attempt]
    events: list[Record]
    config: str
    warnings: list[str]

    @property
    def recurrence(self) -> Recurrence | None:
        """The newest state by iteration, from an evaluation or a probe of a training step."""
        probes = (_recurrence(record, "training probe") for record in reversed(self.current))
        newest = [next((probe for probe in probes if probe), None)]
        newest += [evaluation.recurrence for evaluation in self.evaluations]
        # An evaluation averages over many batches and goes deeper than a probe of the same step.
        return max((probe for probe in reversed(newest) if probe), key=lambda probe: probe.step, default=None)

    @property
    def best(self) -> tuple[float, int, int] | None:
        """(loss in nats, depth, step) of the lowest validation loss."""
        return min(((e.loss[r], r, e.step) for e in self.evaluations for r in e.loss), default=None)

    def replay_difference(self) -> tuple[int, float] | None:
        """Return (steps replayed, largest difference of their losses in nats), or None if no step was replayed."""
        current = {record["step"]: number(record, "loss") for record in self.current}
        pairs = [(number(record, "loss"), current.get(record["step"])) for record in self.abandoned]
        differences = [abs(old - new) for old, new in pairs if old is not None and new is not None]
        return (len(differences), max(differences)) if differences else None


def number(record: Record, field: str) -> float | None:
    """Return a field that is a finite number, else None."""
    return _finite(record.get(field))


def depth(record: Record) -> int | None:
    """Return the drawn depth r = n + k of a step record, if it has one."""
    drawn = record.get("num_steps")
    if isinstance(drawn, list) and drawn and all(isinstance(part, int) for part in drawn):
        return sum(drawn)
    return None


def depth_counts(record: Record) -> dict[int, int]:
    """Return how often each depth was drawn in a step: once a step, or once a micro-batch or sequence."""
    several = record.get("depths")
    if isinstance(several, dict):
        return {int(r): count for r, count in several.items() if str(r).isdecimal() and isinstance(count, int)}
    drawn = depth(record)
    return {} if drawn is None else {drawn: 1}


def read_runs(run_dirs: Iterable[Path]) -> list[RunView]:
    """Read runs to be shown together.

    Raises:
        RunLogError: a directory is missing, or the same one is named twice.
    """
    paths = [run_dir.resolve() for run_dir in run_dirs]
    for path in paths:
        if paths.count(path) > 1:
            raise RunLogError(f"run directory {path} is named twice: name every run once")
    return [_read_run(path, name) for path, name in zip(paths, _labels(paths), strict=True)]


def _labels(paths: list[Path]) -> list[str]:
    """Shortest path endings that tell the runs apart: usually their directory names."""
    longest = max((len(path.parts) for path in paths), default=1)
    for length in range(1, longest + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read_run(run_dir: Path, name: str) -> RunView:
    split = branches(run_dir)
    events = EventsFollower(run_dir / "events.jsonl")
    event_records = events.poll()
    evaluations, unreadable = _read_evaluations(run_dir)
    warnings = list(unreadable)
    if damaged := split.damaged + events.damaged:
        warnings.append(f"{damaged} unreadable line{'s' * (damaged > 1)} in the log skipped")
    try:
        config = (run_dir / "run.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        config = ""
    return RunView(
        name=name,
        current=split.current,
        abandoned=split.abandoned,
        evaluations=_with_validations(evaluations, split.current),
        attempts=_read_attempts(run_dir, split.current + split.abandoned),
        events=event_records,
        config=config,
        warnings=warnings,
    )


def _read_attempts(run_dir: Path, records: list[Record]) -> list[Attempt]:
    spans: dict[int, tuple[int, int]] = {}
    for record in records:
        first, last = spans.get(record["attempt"], (record["step"], record["step"]))
        spans[record["attempt"]] = (min(first, record["step"]), max(last, record["step"]))
    numbers = attempts(run_dir)
    found = []
    for attempt in numbers:
        outcome = read_outcome(run_dir, attempt)
        if outcome is None:
            ending = "still running, or killed" if attempt == numbers[-1] else "killed"
            found.append(Attempt(attempt, spans.get(attempt), None, ending))
            continue
        code = outcome.get("exit_code")
        code = code if isinstance(code, int) else None
        word = "ended without an exit code" if code is None else ENDINGS.get(code, f"crashed with exit code {code}")
        reason = outcome.get("reason")
        found.append(Attempt(attempt, spans.get(attempt), code, f"{word}: {reason}" if reason else word))
    return found


def _read_evaluations(run_dir: Path) -> tuple[list[Evaluation], list[str]]:
    evaluations, warnings = [], []
    for path in (run_dir / "eval").glob("step-*.json"):
        try:
            evaluations.append(_evaluation(json.loads(path.read_bytes())))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            warnings.append(f"eval/{path.name} cannot be read as an evaluation")
    return sorted(evaluations, key=lambda evaluation: evaluation.step), sorted(warnings)


def _with_validations(evaluations: list[Evaluation], records: list[Record]) -> list[Evaluation]:
    """Add the validations of step records; an evaluation of the same step counts more, since it read more."""
    known = {evaluation.step for evaluation in evaluations}
    found = []
    for record in records:
        if isinstance(record.get("validation"), dict) and record["step"] not in known:
            try:
                found.append(
                    _evaluation({"step": record["step"], "tokens": record.get("tokens"), "loss": record["validation"]})
                )
            except ValueError:  # a depth that is no number
                continue
    return sorted([*evaluations, *found], key=lambda evaluation: evaluation.step)


def _evaluation(content: Any) -> Evaluation:
    losses = {int(r): _finite(loss) for r, loss in content["loss"].items()}
    return Evaluation(
        step=int(content["step"]),
        tokens=number(content, "tokens"),
        loss={r: loss for r, loss in sorted(losses.items()) if loss is not None},
        unigram_entropy=number(content, "unigram_entropy"),
        mean_recurrence=number(content, "mean_recurrence"),
        recurrence=_recurrence(content, "evaluation"),
    )


def _recurrence(content: Record, source: str) -> Recurrence | None:
    norms, residuals = (_numbers(content.get(field)) for field in ("state_rms", "relative_residual"))
    return Recurrence(int(content["step"]), source, norms, residuals) if norms or residuals else None


def _numbers(values: Any) -> list[float | None]:
    return [_finite(value) for value in values] if isinstance(values, list) else []


def _finite(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None
