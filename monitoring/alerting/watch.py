"""Alerts as seen from a login node: what rank 0 could not send, how attempts ended, and the dead-man check."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from monitoring.alerting.alerts import AlertsConfig, Notice, compose, deliver, notice_of_ending, notice_of_event
from monitoring.alerting.channels import DeliveryError
from monitoring.alerting.deadman import DeadMan, Pulse
from monitoring.alerting.log import AlertLog
from monitoring.runlog import EventsFollower, attempts, read_outcome

OLDEST_SECONDS = 24 * 3600.0
"""What happened before that is told nobody any more."""


@dataclass(kw_only=True)
class Round:
    """What one look at a run came to.

    Attributes:
        pulse: how the run stands.
        sent: ids of the alerts that left, with their channel.
        problems: channel -> why an alert could not be sent.
    """

    pulse: Pulse
    sent: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


class AlertWatch:
    """Looks at a run again and again, and sends what has not been sent.

    Args:
        run_dir: the run directory.
        name: the run's name.
        config: who is told of what.
    """

    def __init__(self, run_dir: Path, name: str, config: AlertsConfig) -> None:
        self._run_dir, self._name, self._config = run_dir, name, config
        self._dead_man = DeadMan(run_dir, config.dead_man)
        self._log = AlertLog(run_dir)
        self._events = EventsFollower(run_dir / "events.jsonl")
        self._endings: set[int] = set()
        self._pending: dict[str, Notice] = {}

    def look(self) -> Round:
        """Look once.

        Raises:
            RunLogError: there is no run in that directory.
        """
        found = Round(pulse=self._dead_man.look())
        for notice in self._news(found.pulse):
            self._pending.setdefault(notice.id, notice)
        # The newest first: it stands for those like it that are older.
        for notice in sorted(self._pending.values(), key=_time, reverse=True):
            channels = [channel for channel in self._config.channels if channel not in found.problems]
            results = deliver(notice, self._config, self._log, self._name, self._run_dir, channels)
            found.sent += [f"{notice.id} by {channel}" for channel, problem in results.items() if problem is None]
            found.problems |= {channel: problem for channel, problem in results.items() if problem is not None}
        self._pending = {id_: each for id_, each in self._pending.items() if self._waits(each)}
        return found

    def test(self) -> Round:
        """Send a test on every channel, whatever was sent before."""
        found = Round(pulse=self._dead_man.look())
        notice = Notice(id="test", key="test", fields={"kind": "test", "time": time.time()})
        for channel, send in self._config.channels.items():
            try:
                send(compose(notice, self._name, self._run_dir))
                found.sent.append(f"test by {channel}")
            except DeliveryError as error:
                found.problems[channel] = str(error)
        return found

    def _news(self, pulse: Pulse) -> Iterable[Notice]:
        notices = [notice_of_event(event, self._config) for event in self._events.poll()]
        for attempt in set(attempts(self._run_dir)) - self._endings:
            outcome = read_outcome(self._run_dir, attempt)
            if outcome is not None:
                self._endings.add(attempt)
                notices.append(notice_of_ending(attempt, outcome, self._config))
        if pulse.state == "silent" and "silent" in self._config.kinds:
            facts = {name: getattr(pulse, name) for name in ("attempt", "step", "reason", "value", "threshold")}
            facts |= {"kind": "silent", "time": time.time()}
            notices.append(Notice(id=f"{pulse.mark}:silent", key="silent", fields=facts))
        return [each for each in notices if each is not None and time.time() - _time(each) < OLDEST_SECONDS]

    def _waits(self, notice: Notice) -> bool:
        """Whether a notice may still have to be sent."""
        over = all(self._log.over(notice.id, channel) for channel in self._config.channels)
        return not over and time.time() - _time(notice) < OLDEST_SECONDS


def _time(notice: Notice) -> float:
    when = notice.fields.get("time")
    return float(when) if isinstance(when, int | float) else time.time()
