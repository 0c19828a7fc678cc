"""How a run of the training loop ended: exit code, reason in words, and what outcome.json says beside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from monitoring.runlog import Record
from pipeline.control import Cause, Flag
from pipeline.errors import ExitCode


@dataclass(frozen=True)
class Ending:
    """How a loop ended.

    Attributes:
        code: the exit code.
        reason: why, in words.
        fields: what outcome.json says beside it.
    """

    code: ExitCode
    reason: str
    fields: dict[str, Any] = field(default_factory=dict)


def cause_fields(cause: Cause | None) -> dict[str, Any]:
    """Return what events and outcomes say of a cause."""
    return {} if cause is None else {**dataclasses.asdict(cause), "flag": cause.flag.name.lower()}


def ended(step: int, stop: Cause | None, not_saved: str | None, newest: str | None) -> Ending:
    """Return the ending after the last step, or because of `stop`.

    Args:
        step: completed steps.
        stop: why the ranks agreed to stop before the last one.
        not_saved: why the last save failed.
        newest: name of the newest checkpoint that there is.
    """
    why, fields = "all steps done" if stop is None else str(stop), cause_fields(stop)
    if not_saved is not None:
        there = "there is no checkpoint" if newest is None else f"the newest checkpoint is {newest}"
        reason = f"{why}, but step {step} could not be saved: {not_saved}; {there}; mend that and submit again"
        return Ending(ExitCode.STOPPED, reason, fields | {"not_saved": not_saved})
    if stop is None:
        return Ending(ExitCode.FINISHED, why)
    return Ending(ExitCode.STOPPED, f"{why}, saved at step {step}", fields)


def gave_up(step: int, reason: str, newest: str | None) -> Ending:
    """Return the ending of a run that could not be brought back.

    Args:
        step: completed steps.
        reason: what was found, and why nothing more is done about it.
        newest: name of the newest checkpoint that there is.
    """
    there = "there is no checkpoint" if newest is None else f"the newest checkpoint is {newest}"
    advice = "see its incidents (`rookery report`); start again with a lower optimizer.learning_rate, or other data"
    return Ending(ExitCode.DIVERGED, f"gave up at step {step}: {reason}; {there}; {advice}")


def diverged(record: Record, cause: Cause | None, newest: str | None) -> Ending:
    """Return the ending after a step whose loss or gradient is not finite.

    Args:
        record: of that step.
        cause: which rank saw it first, if one did.
        newest: name of the newest checkpoint that there is.
    """
    reason = f"loss {record['loss']} and gradient norm {record['grad_norm']} at step {record['step']}"
    if cause is not None and cause.flag is Flag.NON_FINITE:
        reason += f", {cause} first" if cause.ranks > 1 else f", {cause} alone"
    # Weights may have been blown up, though finite, when they were saved.
    advice = "" if newest is None else f"; if that fails at once, move {newest} away first"
    reason = f"{reason}; start again with a lower optimizer.learning_rate{advice}"
    return Ending(ExitCode.DIVERGED, reason, cause_fields(cause))
