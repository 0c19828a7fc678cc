"""One run as the report and the live page show it: everything a run directory holds, whatever is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from monitoring.goodput import Ledger
from monitoring.reading.columns import Array, as_float
from monitoring.reading.run_table import RunTable
from monitoring.runlog import Record

ENDINGS = {
    0: "finished",
    10: "stopped with a checkpoint, to be continued",
    11: "diverged",
    12: "refused its input",
    13: "stopped: unhealthy node",
}
"""The exit codes of docs/architecture.md in words."""

INCIDENTS = frozenset(
    {
        "finding",
        "skip",
        "replay",
        "rollback",
        "suspected_hardware",
        "interval",
        "gave_up",
        "non_finite",
        "loss_scale",
        "checkpoint_failed",
        "sink_off",
    }
)
"""Kinds of events that tell of trouble with the training itself."""


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
        state_rms: root mean square of the state after iteration 1, 2, ...; nan where it was not finite.
        relative_residual: mean of |s_i - s_(i-1)| / |s_i|, same indices.
    """

    step: int
    source: str
    state_rms: Array
    relative_residual: Array


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
    """A run, as far as it is read; good until its table is polled again.

    Attributes:
        name: label, unique among the runs shown together.
        table: the step records.
        evaluations: by step, the validations of step records among them.
        attempts: by number.
        events: the newest ones, in the order written.
        crashes: crash reports of attempts, by number.
        ledger: where the allocated time went; None if nothing is known of it.
        config: text of run.yaml, empty if there is none.
        warnings: what could not be read or looks wrong, in words.
        window: (column, low, high) if only a part of the steps is shown.
    """

    name: str
    table: RunTable
    evaluations: Sequence[Evaluation]
    attempts: Sequence[Attempt]
    events: Sequence[Record]
    crashes: Sequence[Record]
    ledger: Ledger | None
    config: str
    warnings: Sequence[str]
    window: tuple[str, float, float] | None = None

    def between(self, axis: str, low: float, high: float) -> RunView:
        """Return the same run with the steps of a range of "step" or "tokens", ends included, and no others."""
        assert axis in ("step", "tokens"), axis
        return replace(self, window=(axis, low, high))

    def rows(self, abandoned: bool = False) -> Array:
        """Return the rows of the table that the run stands on, or else those superseded, in order."""
        shown = ~self.table.current if abandoned else self.table.current
        if self.window is not None:
            axis, low, high = self.window
            column = self.table.column(axis)
            shown = shown & (column >= low) & (column <= high)
        return np.flatnonzero(shown)

    def probe(self, name: str, abandoned: bool = False) -> tuple[Array, Array]:
        """Return (rows, values) of a probe that is one number, of the same rows as `rows`."""
        rows, values = self.table.probe(name)
        shown = np.isin(rows, self.rows(abandoned), assume_unique=True)
        return rows[shown], values[shown]

    def samples(self, name: str) -> list[tuple[int, Any]]:
        """Return (step, value) of a probe that is not one number, of the rows that the run stands on."""
        found = self.table.samples(name)
        rows = np.array(found.rows, dtype=np.int64)
        shown = np.isin(rows, self.rows(), assume_unique=True).tolist()
        steps = self.table.column("step")[rows].tolist()
        return [(step, value) for step, value, show in zip(steps, found.values, shown, strict=True) if show]

    @property
    def last(self) -> Record:
        """The newest step record, as logged; empty before the first."""
        return self.table.newest

    @property
    def incidents(self) -> list[tuple[int, Record]]:
        """(place among the events, event) of those that tell of trouble with the training."""
        return [(place, event) for place, event in enumerate(self.events) if event["kind"] in INCIDENTS]

    @property
    def recurrence(self) -> Recurrence | None:
        """The newest state by iteration, from an evaluation or a probe of a training step."""
        norms, residuals = dict(self.samples("state_rms")[-1:]), dict(self.samples("relative_residual")[-1:])
        newest = [evaluation.recurrence for evaluation in self.evaluations if evaluation.recurrence]
        if norms or residuals:
            step = max([*norms, *residuals])
            none = np.empty(0)
            newest.insert(0, Recurrence(step, "training probe", norms.get(step, none), residuals.get(step, none)))
        # An evaluation averages over many batches and goes deeper than a probe of the same step.
        return max(reversed(newest), key=lambda probe: probe.step, default=None)

    @property
    def best(self) -> tuple[float, int, int] | None:
        """(loss in nats, depth, step) of the lowest validation loss."""
        return min(((e.loss[r], r, e.step) for e in self.evaluations for r in e.loss), default=None)

    def replay_difference(self) -> tuple[int, float] | None:
        """Return (steps replayed, largest difference of their losses in nats), or None if no step was replayed.

        Steps after a rollback are other data under an old number: they do not count.
        """
        step, loss, branch = (self.table.column(name) for name in ("step", "loss", "branch"))
        now, old = self.rows(), self.rows(abandoned=True)
        if not len(now) or not len(old):
            return None
        places = now[np.minimum(np.searchsorted(step[now], step[old]), len(now) - 1)]
        with np.errstate(invalid="ignore"):
            differences = np.abs(loss[old] - loss[places])
        same = (step[old] == step[places]) & (branch[old] == branch[places]) & np.isfinite(differences)
        return (int(same.sum()), float(differences[same].max())) if same.any() else None


def number(record: Record, field: str) -> float | None:
    """Return a field that is a finite number, else None."""
    return finite(record.get(field))


def finite(value: object) -> float | None:
    """Return a number that is finite, else None."""
    found = as_float(value)
    return found if np.isfinite(found) else None


def as_text(value: object) -> str:
    """Return a value of a record as JSON text, for people."""
    return json.dumps(value, indent=1, default=str)
