"""Back to a checkpoint from before something went wrong, and on from there past the data that it happened on.

A rollback is an event before it is done: a run that is killed in between does the same at its next start. What it
leaves behind stays in the log, as a branch that the run does not stand on any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.checkpoints.manifest import Progress


@dataclass(frozen=True)
class Adjustment:
    """Another learning rate than the schedule's from a step on.

    Attributes:
        step: completed steps at which it begins.
        factor: of the scheduled rate.
        rewarm_steps: steps of linear rise to it.
    """

    step: int
    factor: float
    rewarm_steps: int

    def from_step(self, step: int) -> Adjustment:
        """Return what it is from an earlier step on, without a warm-up of its own; itself if it began before."""
        return self if self.step <= step else Adjustment(step, self.factor, 0)


def rate_factor(adjustments: Sequence[Adjustment], step: int) -> float:
    """Return what the scheduled learning rate of `step` (from 0) is multiplied by; adjustments add up."""
    product = 1.0
    for each in adjustments:
        if step >= each.step:
            product *= each.factor * min(1.0, (step - each.step + 1) / (each.rewarm_steps + 1))
    return product


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """One rollback of a run.

    Attributes:
        from_step: completed steps when it was decided.
        to_step: those of the checkpoint that it goes back to.
        branch: number of rollbacks so far, this one included.
        samples_from: samples consumed at `to_step`.
        samples_to: sample to go on with; those in between are not trained on.
        adjustments: of the learning rate, from now on, older ones included.
    """

    from_step: int
    to_step: int
    branch: int
    samples_from: int
    samples_to: int
    adjustments: list[Adjustment] = field(default_factory=list)

    def __str__(self) -> str:
        """Say it to people."""
        rate = rate_factor(
            self.adjustments, max((each.step + each.rewarm_steps for each in self.adjustments), default=0)
        )
        left_out, slower = self.samples_to - self.samples_from, f", learning rate x {rate:g}" if rate != 1.0 else ""
        return f"rolled back from step {self.from_step} to step {self.to_step}; {left_out} samples are left out{slower}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as the event's fields."""
        return asdict(self)

    @classmethod
    def from_event(cls, event: Mapping[str, Any]) -> Rollback:
        """Read an event of the kind "rollback"."""
        counts = {name: int(event[name]) for name in ("from_step", "to_step", "branch", "samples_from", "samples_to")}
        return cls(**counts, adjustments=read_adjustments(event["adjustments"]))


def read_adjustments(content: Sequence[Mapping[str, Any]]) -> list[Adjustment]:
    """Return what `asdict` made of adjustments."""
    return [Adjustment(**each) for each in content]


def left_behind(rollbacks: Sequence[Rollback], branch: int, step: int) -> Rollback | None:
    """Return the rollback that went back behind a state of `branch` after `step` steps, if one did."""
    return next((each for each in rollbacks if each.branch > branch and each.to_step < step), None)


def resumed(
    saved: Progress, adjustments: Sequence[Adjustment], rollbacks: Sequence[Rollback]
) -> tuple[Progress, list[Adjustment]]:
    """Return where a run goes on that resumes from a checkpoint: there, or past what a rollback to it leaves out.

    Args:
        saved: progress of the checkpoint.
        adjustments: that held when it was saved.
        rollbacks: of the run, in order.
    """
    if not rollbacks or saved.branch >= rollbacks[-1].branch:
        return saved, list(adjustments)
    newest = rollbacks[-1]
    samples = max(saved.samples, newest.samples_to)
    return replace(saved, samples=samples, branch=newest.branch), newest.adjustments


def data_to_skip(wanted: int, saved: int, *, needed: int, length: int | None) -> int:
    """Return the sample to go on with after a rollback.

    Args:
        wanted: where the data are good again.
        saved: samples consumed at the checkpoint.
        needed: samples that the rest of the run trains on.
        length: samples that the datasets give, None for as many as are asked for.
    """
    return wanted if length is None else max(saved, min(wanted, length - needed))
