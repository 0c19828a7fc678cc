"""How a run stands at this moment, as the live page's head and the terminal screen say it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monitoring.goodput import SILENT_SECONDS
from monitoring.reading.run_config import planned_steps
from monitoring.reading.runview import ENDINGS, RunView, number
from monitoring.runlog import Record, attempts, read_outcome

ALIVE = ("starting", "running", "stalled")
"""States of a run whose newest attempt goes on, as far as can be told."""

_STALLED_SECONDS = 120.0
_STALLED_STEPS = 20.0  # steps differ in time by a factor of ten, by their depth
_CLOCK_SECONDS = 5.0
_RECENT = 200
# A rank that does one of these completes no step, and that is all right; its watchdog limits it.
_LONG_PHASES = {"build", "load", "save", "validation", "checkpoint tiers", "node check", "data", "start", "profile"}


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a run stands; what is not known is None.

    Attributes:
        run: name.
        state: "empty", "starting", "running", "stalled", "silent", or how the newest attempt ended.
        mood: "good", "bad" or "".
        since: unix seconds at which a run that does not go on was last heard of, or ended.
        detail: more about the state, in words.
        attempt: number of the newest attempt.
        step: newest step that the run stands on.
        steps: steps in all, as configured.
        tokens: seen by the newest step.
        loss: nats, of the newest step; it may be "nan" or "inf".
        depth: drawn for the newest step.
        tokens_per_second: over the last steps.
        seconds_left: until the last step at the pace of the last steps, pauses between them included.
        goodput: share of the allocated time that went into steps which the run stands on.
        checkpoint_step: of the newest checkpoint.
        checkpoint_age: seconds since it was complete.
        heartbeat_age: seconds since the newest attempt's heartbeat.
        step_age: seconds since the newest step.
        incidents: number of incidents, as far back as events are kept.
        newest_incident: the newest one in words.
        warnings: what is odd about the directory, in words.
    """

    run: str
    state: str
    mood: str
    since: float | None
    detail: str
    attempt: int | None
    step: int | None
    steps: int | None
    tokens: float | None
    loss: float | str | None
    depth: int | None
    tokens_per_second: float | None
    seconds_left: float | None
    goodput: float | None
    checkpoint_step: int | None
    checkpoint_age: float | None
    heartbeat_age: float | None
    step_age: float | None
    incidents: int
    newest_incident: str
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        return asdict(self)


def standing(run_dir: Path, view: RunView, now: float) -> Standing:
    """Return how a run stands.

    Args:
        run_dir: its directory.
        view: what was read of it so far.
        now: unix seconds to look from.

    Raises:
        RunLogError: there is no such directory any more.
    """
    newest = max(attempts(run_dir), default=None)
    beat = _read_heartbeat(run_dir, newest)
    tail = _Tail.of(view)
    beaten, stepped = number(beat, "time"), tail.time
    state, mood, since, detail = _state(run_dir, newest, beat, tail, now)
    warnings = list(view.warnings)
    ahead = max((each - now for each in (beaten, stepped) if each is not None), default=0.0)
    if ahead > _CLOCK_SECONDS and state in ALIVE:
        warnings.append(f"the clock of the machine that trains is {ahead:,.0f} s ahead of this one's, and so are ages")
    saved = (event for event in reversed(view.events) if event["kind"] == "checkpoint")
    checkpoint = next((event for event in saved if type(event.get("step")) is int), {})
    total = planned_steps(view.config)
    incidents = view.incidents
    return Standing(
        run=view.name,
        state=state,
        mood=mood,
        since=since,
        detail=detail,
        attempt=newest,
        step=tail.step,
        steps=total,
        tokens=tail.tokens,
        loss=tail.loss,
        depth=tail.depth,
        tokens_per_second=tail.tokens_per_second,
        seconds_left=tail.seconds_left(total) if state in ALIVE else None,
        goodput=None if view.ledger is None else view.ledger.share,
        checkpoint_step=checkpoint.get("step"),
        checkpoint_age=_age(number(checkpoint, "time"), now),
        heartbeat_age=_age(beaten, now),
        step_age=_age(stepped, now),
        incidents=len(incidents),
        newest_incident=_words(incidents[-1][1]) if incidents else "",
        warnings=warnings,
    )


def _words(incident: Record) -> str:
    step = number(incident, "from_step" if "from_step" in incident else "step")
    detector = incident.get("detector")
    what = (detector if isinstance(detector, str) and detector else incident["kind"]).replace("_", " ")[:100]
    return what if step is None else f"{what} at step {step:,.0f}"


@dataclass(frozen=True)
class _Tail:
    """The newest steps that a run stands on, as far as its head needs them."""

    step: int | None
    tokens: float | None
    loss: float | str | None
    depth: int | None
    time: float | None
    attempt: int | None
    tokens_per_second: float | None
    longest: float
    pace: float | None

    @classmethod
    def of(cls, view: RunView) -> _Tail:
        table, rows = view.table, view.rows()[-_RECENT:]
        if not len(rows):
            return cls(None, None, None, None, None, None, None, 0.0, None)
        last = int(rows[-1])
        values = {name: table.column(name)[rows] for name in ("seconds", "tokens_per_second", "time", "attempt")}
        timed = np.isfinite(values["seconds"]) & np.isfinite(values["tokens_per_second"])
        seconds = values["seconds"][timed]
        trained = float(np.sum(seconds * values["tokens_per_second"][timed]))
        loss = float(table.column("loss")[last])
        drawn = float(table.column("r")[last])
        return cls(
            step=int(table.column("step")[last]),
            tokens=_known(table.column("tokens")[last]),
            loss=loss if np.isfinite(loss) else str(loss),
            depth=int(drawn) if drawn > 0 else None,
            time=_known(values["time"][-1]),
            attempt=int(values["attempt"][-1]),
            tokens_per_second=trained / float(seconds.sum()) if seconds.sum() > 0.0 else None,
            longest=float(seconds.max(initial=0.0)),
            pace=_pace(values["time"][values["attempt"] == values["attempt"][-1]], seconds),
        )

    def seconds_left(self, total: int | None) -> float | None:
        """Return the seconds until step `total` at the pace of these steps."""
        if self.pace is None or self.step is None or total is None:
            return None
        return max(0.0, self.pace * (total - self.step))


def _pace(times: np.ndarray, seconds: np.ndarray) -> float | None:
    """Return the seconds from one step to the next; by the clock, unless that jumped."""
    trained = float(seconds.mean()) if len(seconds) else None
    if len(times) > 1:
        passed = float(times[-1] - times[0]) / (len(times) - 1)
        if trained is None:
            return passed if passed > 0.0 else None
        if trained <= passed <= 3.0 * trained:
            return passed
    return trained


def _state(
    run_dir: Path, newest: int | None, beat: Record, tail: _Tail, now: float
) -> tuple[str, str, float | None, str]:
    """Return state, mood, since when, and a detail."""
    if newest is None:
        return "empty", "", None, "nothing was logged yet: no attempt has begun"
    outcome = read_outcome(run_dir, newest)
    if outcome is not None:
        return _ended(outcome)
    stepped = tail.time if tail.attempt == newest else None
    signs = [each for each in (number(beat, "time"), stepped) if each is not None]
    sign = max(signs) if signs else begun(run_dir, newest)
    if sign is None or now - sign > max(SILENT_SECONDS, 5.0 * tail.longest):
        return "silent", "bad", sign, "no sign of life and no outcome: killed, or its node died"
    phase = str(beat.get("phase", ""))
    if stepped is None:
        return "starting", "", None, phase
    if phase not in _LONG_PHASES and now - stepped > max(_STALLED_SECONDS, _STALLED_STEPS * tail.longest):
        return "stalled", "bad", stepped, f"alive, but no step was completed since; in phase {phase or 'unknown'}"
    return "running", "good", None, phase if phase in _LONG_PHASES else ""


def _ended(outcome: Record) -> tuple[str, str, float | None, str]:
    code = outcome.get("exit_code")
    known = ENDINGS.get(code) if isinstance(code, int) else None
    state = known or ("crashed" if isinstance(code, int) else "ended")
    reason = str(outcome.get("reason") or "")
    detail = reason if known else f"exit code {code}" + (f": {reason}" if reason else "")
    return state, "good" if code in (0, 10) else "bad", number(outcome, "time"), detail


def _read_heartbeat(run_dir: Path, attempt: int | None) -> Record:
    if attempt is not None:
        with suppress(OSError, ValueError):
            beat = json.loads((run_dir / "attempts" / f"{attempt:04d}" / "heartbeat.json").read_bytes())
            return beat if isinstance(beat, dict) else {}
    return {}


def begun(run_dir: Path, attempt: int) -> float | None:
    """Return about when an attempt began: before its first heartbeat nothing else tells."""
    for path in (f"attempts/{attempt:04d}", f"metrics/{attempt:04d}.jsonl"):
        with suppress(OSError):
            return (run_dir / path).stat().st_mtime
    return None


def _age(then: float | None, now: float) -> float | None:
    return None if then is None else max(0.0, now - then)


def _known(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
