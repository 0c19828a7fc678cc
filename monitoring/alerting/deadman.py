"""The dead-man check: whether a run that should be at work still gives signs of life, as seen from another machine.

The heartbeat (`attempts/NNNN/heartbeat.json`) is written every ten seconds whatever the step does, the step's record
when it is done. Clocks of nodes may differ or be set back: an age is the least that time stamps allow, and after the
first look only what this process has seen change counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from monitoring.errors import MonitorConfigError
from monitoring.reading.run_config import require_run
from monitoring.reading.step_records import read_ends
from monitoring.runlog import Record, attempts, read_outcome

_TAIL_BYTES = 256 * 1024
_ENOUGH_STEPS = 8
_SKEW_SECONDS = 60.0
# Where the heartbeat says that a step is at work; everything else (a save, a validation, the start) takes its time.
_STEP_PHASES = {"between steps", "step", "data", "forward", "backward", "optimizer", "control"}


@dataclass(kw_only=True)
class DeadManConfig:
    """When `rookery alerts` takes a run for dead."""

    silent_minutes: float = 5.0
    """Least age of the last sign of life."""
    stalled_factor: float = 20.0
    """Steps have stopped when the newest is so many times older than the longest of the last ones took."""
    start_minutes: float = 60.0
    """The same for the first steps of an attempt, and while it saves or validates."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name in ("silent_minutes", "stalled_factor", "start_minutes"):
            if getattr(self, name) <= 0.0:
                raise MonitorConfigError(f"monitor.alerts.dead_man.{name}: {getattr(self, name)} is not positive")


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """How a run stands.

    Attributes:
        state: waiting (no attempt yet), alive, silent, finished, stopped (it will be submitted again) or failed.
        reason: in words.
        attempt: the newest one, 0 if there is none.
        step: of the newest record or heartbeat, None if there is none.
        age: seconds since the last sign of life, of a run that should be at work.
        value: silent: seconds for which there was none, or no step.
        threshold: silent: how many of them would be much.
        mark: what the silence began with: equal as long as it lasts.
    """

    state: str
    reason: str
    attempt: int = 0
    step: int | None = None
    age: float | None = None
    value: float | None = None
    threshold: float | None = None
    mark: str = ""

    @property
    def alarm(self) -> bool:
        """Whether a person has to look."""
        return self.state in ("silent", "failed")


class DeadMan:
    """Looks at a run again and again.

    Args:
        run_dir: the run directory.
        config: what is allowed.
        clock: unix seconds of this machine.
        ticks: seconds of a clock that nobody sets.
    """

    def __init__(
        self,
        run_dir: Path,
        config: DeadManConfig,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_dir, self._config, self._clock, self._ticks = run_dir, config, clock, ticks
        self._life, self._progress = _Change(), _Change()

    def look(self) -> Pulse:
        """Return how the run stands now.

        Raises:
            RunLogError: there is no run in that directory.
        """
        require_run(self._run_dir)
        numbers = attempts(self._run_dir)
        if not numbers:
            return Pulse(state="waiting", reason="no attempt has begun yet")
        attempt = numbers[-1]
        outcome = read_outcome(self._run_dir, attempt)
        if outcome is not None:
            return _ended(attempt, outcome)
        return self._judge(attempt)

    def _judge(self, attempt: int) -> Pulse:
        directory = self._run_dir / "attempts" / f"{attempt:04d}"
        metrics = self._run_dir / "metrics" / f"{attempt:04d}.jsonl"
        now, ticks = self._clock(), self._ticks()
        beat = _read(directory / "heartbeat.json")
        steps = read_ends(metrics, _TAIL_BYTES).newest
        newest = steps[-1] if steps else {}
        beat_times = [beat.get("time"), _modified(directory / "heartbeat.json")]
        step_times = [newest.get("time"), _modified(metrics)]
        if not steps:
            step_times = [_modified(directory / "run.yaml") or _modified(directory) or _modified(metrics)]
        step_marker = (attempt, newest.get("step"), newest.get("time"))
        progress = self._progress.age(step_marker, _age(now, step_times), ticks)
        life = self._life.age((attempt, *map(str, beat_times)), _age(now, beat_times), ticks) if beat else progress
        quiet, limit = min(life, progress), self._limit(beat, steps, begun=directory.is_dir())
        step = max((each for each in (beat.get("step"), newest.get("step")) if isinstance(each, int)), default=None)
        silent = self._config.silent_minutes * 60.0
        if beat and quiet > silent:
            value, threshold, what = quiet, silent, "has given no sign of life"
            why = "and none of its end: it was killed, or its node died, hangs, or cannot write"
        elif progress > limit:
            value, threshold, what = progress, limit, "has done no step"
            why = f"in phase {str(beat.get('phase'))[:100]!r}; {_span(limit)} would be much"
        else:
            return Pulse(state="alive", reason="at work", attempt=attempt, step=step, age=quiet)
        return Pulse(
            state="silent",
            reason=f"attempt {attempt} {what} for {_span(value)}, {why}",
            attempt=attempt,
            step=step,
            age=quiet,
            value=value,
            threshold=threshold,
            mark=f"{attempt}:{step}:{newest.get('step')}",
        )

    def _limit(self, beat: Record, steps: list[Record], *, begun: bool) -> float:
        """Return the seconds after which the pace of the run makes it likely that its steps have stopped."""
        start, least = self._config.start_minutes * 60.0, self._config.silent_minutes * 60.0
        if not begun:
            return least
        times = [float(each["time"]) for each in steps if isinstance(each.get("time"), int | float)]
        gaps = sorted(later - earlier for earlier, later in pairwise(times))
        if len(times) < _ENOUGH_STEPS:
            return start
        # The longest of many may be a clock that was set.
        longest = gaps[-2] if len(gaps) > 2 * _ENOUGH_STEPS else gaps[-1]
        limit = max(least, self._config.stalled_factor * longest)
        return limit if beat.get("phase", "step") in _STEP_PHASES else max(limit, start)


class _Change:
    """How long ago something last changed: by time stamps at the first look, afterwards by having seen it."""

    def __init__(self) -> None:
        self._marker: Hashable = None
        self._since = self._before = 0.0

    def age(self, marker: Hashable, stamped: float, ticks: float) -> float:
        if marker != self._marker:
            self._before = stamped if self._marker is None else 0.0
            self._marker, self._since = marker, ticks
        return self._before + ticks - self._since


def _ended(attempt: int, outcome: Record) -> Pulse:
    code = outcome.get("exit_code")
    state = {0: "finished", 10: "stopped"}.get(code if isinstance(code, int) else -1, "failed")
    reason = f"attempt {attempt} ended with {code}: {str(outcome.get('reason'))[:500]}"
    return Pulse(state=state, reason=reason, attempt=attempt)


def _age(now: float, stamps: list[Any]) -> float:
    """Return the least age that time stamps of different clocks allow; 0 where all of them lie ahead."""
    ages = [now - stamp for stamp in stamps if isinstance(stamp, int | float)]
    return max(0.0, min((age for age in ages if age >= -_SKEW_SECONDS), default=0.0))


def _read(path: Path) -> Record:
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def _modified(path: Path) -> float | None:
    with suppress(OSError):
        return path.stat().st_mtime
    return None


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120.0 else f"{seconds / 60.0:.0f} min"
