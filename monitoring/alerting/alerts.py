"""Alerts: what of a run a person is told at once, by a command, an e-mail or a webhook.

Rank 0 sends them from a thread while it trains; `rookery alerts`, on a login node, sends what could not leave from
there. Each alert leaves once a channel, and of those that say the same only one within the cool-down.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from monitoring.alerting.channels import (
    Alert,
    DeliveryError,
    EmailConfig,
    WebhookConfig,
    send_by_command,
    send_by_email,
    send_by_webhook,
)
from monitoring.alerting.deadman import DeadManConfig
from monitoring.alerting.log import AlertLog
from monitoring.errors import MonitorConfigError
from monitoring.runlog import Record

KINDS = {
    "finding": "a detector fired, and acted or warns",
    "rollback": "the run went back to an earlier checkpoint",
    "gave_up": "the run may not recover by itself any more",
    "suspected_hardware": "a step computed twice gave two results",
    "checkpoint_failed": "a checkpoint could not be written",
    "non_finite": "the loss or the gradient is not finite, and the run ended",
    "ended": "an attempt failed: a crash, a hang, a bad node, refused input",
    "silent": "nothing is heard of a run that should be at work (`rookery alerts` only)",
    "finished": "all steps are done",
}
"""What alerts are about, in words."""

CLOSE_SECONDS = 20.0
"""How long the end of a run waits for alerts that are on their way."""

_MOST_WAITING = 200
_IDLE_SECONDS = 0.5
_MOST_TEXT, _MOST_ENTRIES, _MOST_DEPTH = 500, 20, 3
_MOST_LINES = 40
_NO_PROGRAMS = ("True", "False", "None")  # what YAML's true, false and null have become by here


@dataclass(kw_only=True)
class AlertsConfig:
    """Who is told of what, and how; nobody as long as there is no command, e-mail or webhook."""

    command: list[str] | None = None
    """Program and arguments; it gets the alert as JSON on its input. No shell."""
    email: EmailConfig | None = None
    webhook: WebhookConfig | None = None
    kinds: list[str] = field(default_factory=lambda: [kind for kind in KINDS if kind != "finished"])
    """What alerts are about."""
    cool_down_minutes: float = 30.0
    """Of alerts of one kind (and one detector) one is sent in this time; the next says how many were not."""
    timeout_seconds: float = 20.0
    """Longest time that a command, a mail server or a webhook may take."""
    from_job: bool = True
    """Send from the job, too; false where compute nodes cannot: then `rookery alerts` sends all of them."""
    dead_man: DeadManConfig = field(default_factory=DeadManConfig)

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.command is not None and not (self.command and self.command[0]):
            raise MonitorConfigError("monitor.alerts.command: is empty; give a list [PROGRAM, ARGUMENT, ...], or null")
        if self.command is not None and (word := self.command[0]) in _NO_PROGRAMS:
            raise MonitorConfigError(
                f"monitor.alerts.command: {word} is no program; give a list [PROGRAM, ARGUMENT, ...], or null"
            )
        for kind in self.kinds:
            if kind not in KINDS:
                raise MonitorConfigError(f"monitor.alerts.kinds: {kind!r} is not one of {', '.join(KINDS)}")
        if self.cool_down_minutes < 0.0:
            raise MonitorConfigError(f"monitor.alerts.cool_down_minutes: {self.cool_down_minutes} is negative")
        if self.timeout_seconds <= 0.0:
            raise MonitorConfigError(f"monitor.alerts.timeout_seconds: {self.timeout_seconds} is not positive")

    @property
    def channels(self) -> dict[str, Callable[[Alert], None]]:
        """Name -> what delivers an alert on that channel or raises `DeliveryError`."""
        found: dict[str, Callable[[Alert], None]] = {}
        if self.command is not None:
            found["command"] = partial(send_by_command, self.command, timeout=self.timeout_seconds)
        if self.email is not None:
            found["email"] = partial(send_by_email, self.email, timeout=self.timeout_seconds)
        if self.webhook is not None:
            found["webhook"] = partial(send_by_webhook, self.webhook, timeout=self.timeout_seconds)
        return found


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something that may be worth an alert: an event, an ending, a silence.

    Attributes:
        id: equal for the same thing wherever it is seen.
        key: its kind, and detector if it has one.
        fields: the facts, with `kind`.
    """

    id: str
    key: str
    fields: Record


def notice_of_event(event: Mapping[str, Any], config: AlertsConfig) -> Notice | None:
    """Return what there is to tell of an event as the run log has it; None if nothing is."""
    kind = str(event.get("kind"))
    if kind not in config.kinds or kind in ("ended", "silent", "finished"):
        return None
    if kind == "finding" and not event.get("acted") and event.get("action") != "warn":
        return None  # observed only
    step, detector = event.get("step", event.get("from_step")), event.get("detector")
    place = (event.get("attempt"), kind, step, detector, event.get("rank"), event.get("tier"))
    key = kind if detector is None else f"{kind} {detector}"
    return Notice(id=":".join(str(part) for part in place if part is not None), key=key[:100], fields=dict(event))


def notice_of_ending(attempt: int, outcome: Mapping[str, Any], config: AlertsConfig) -> Notice | None:
    """Return what there is to tell of an attempt's outcome; None if nothing is."""
    code = outcome.get("exit_code")
    kind = "finished" if code == 0 else "ended"
    told = code == 11 and ("gave_up" in config.kinds or "non_finite" in config.kinds)  # by the event before it
    if code == 10 or told or kind not in config.kinds:
        return None
    return Notice(id=f"{attempt}:{kind}", key=kind, fields={**outcome, "kind": kind, "attempt": attempt})


def compose(notice: Notice, run: str, run_dir: Path, muted: int = 0) -> Alert:
    """Return the alert of a notice: of bounded size, whatever an event holds.

    Args:
        notice: what there is to tell.
        run: the run's name.
        run_dir: its directory.
        muted: number of alerts like this one that were not sent.
    """
    facts = {str(key)[:100]: _bounded(value) for key, value in list(notice.fields.items())[:_MOST_LINES]}
    kind = str(facts["kind"])
    step = facts.get("step", facts.get("from_step"))
    headline = kind.replace("_", " ")
    headline += f" {facts['detector']}" if "detector" in facts else ""
    headline += f" at step {step}" if step is not None else ""
    reason = facts.get("reason") or facts.get("rule")
    headline += f": {reason}" if reason else ""
    lines = [KINDS.get(kind, "a test of this way to be told")]
    lines += [f"{muted} more like it since the last one were not sent"] if muted else []
    lines += [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in facts.items()]
    lines += [f"run: {run}, in {run_dir}", f"look: rookery status {run_dir}"]
    fields = {**facts, "run": run, "run_dir": str(run_dir), "muted": muted, "sent_from": socket.gethostname()}
    subject = f"[rookery] {run}: {headline}"
    return Alert(subject=" ".join(subject.split())[:200], text="\n".join(lines) + "\n", fields=fields)


def deliver(
    notice: Notice, config: AlertsConfig, log: AlertLog, run: str, run_dir: Path, channels: Sequence[str] | None = None
) -> dict[str, str | None]:
    """Send a notice on every channel on which it has not left, if none like it has just now.

    Returns:
        channel -> None if it left, else why not; without the channels on which it was not to be sent.
    """
    results: dict[str, str | None] = {}
    for channel, send in config.channels.items():
        if channels is not None and channel not in channels:
            continue
        muted = log.claim(notice.id, notice.key, channel, config.cool_down_minutes * 60.0)
        if muted is None:
            continue
        try:
            send(compose(notice, run, run_dir, muted))
            results[channel] = None
        except DeliveryError as error:
            results[channel] = str(error)
        log.settle(notice.id, notice.key, channel, results[channel])
    return results


class AlertSender:
    """Sends a run's alerts from rank 0, behind its back: a listener of the run log that neither waits nor raises.

    Args:
        config: who is told of what.
        run_dir: the run directory.
        attempt: number of this launch.
        name: the run's name.
        on_event: told, as `RunLog.event` is, once a channel: `alert_failed` (channel, reason).
    """

    def __init__(
        self, config: AlertsConfig, run_dir: Path, *, attempt: int, name: str, on_event: Callable[..., None]
    ) -> None:
        self._config, self._run_dir, self._attempt, self._name = config, run_dir, attempt, name
        self._on_event, self._failed = on_event, set[str]()
        self._waiting: queue.Queue[Notice | None] = queue.Queue(_MOST_WAITING)
        self._ended = threading.Event()
        self._active = config.from_job and bool(config.channels)
        self._thread = threading.Thread(target=self._work, name="alerts", daemon=True)
        if self._active:
            self._thread.start()

    def record(self, record: Record) -> None:
        """Take the record of a step, which is never worth an alert by itself."""

    def event(self, event: Record) -> None:
        """Take an event as the run log has it."""
        self._put(notice_of_event({"attempt": self._attempt, **event}, self._config))

    def ended(self, exit_code: int, reason: str) -> None:
        """Take how this attempt ended."""
        outcome = {"exit_code": int(exit_code), "reason": reason, "time": time.time()}
        self._put(notice_of_ending(self._attempt, outcome, self._config))

    def close(self) -> None:
        """Let alerts leave that are on their way; returns after `CLOSE_SECONDS` in any case."""
        if self._active and not self._ended.is_set():
            self._ended.set()
            with suppress(queue.Full):
                self._waiting.put_nowait(None)
            self._thread.join(CLOSE_SECONDS)

    def _put(self, notice: Notice | None) -> None:
        if notice is not None and self._active and not self._ended.is_set():
            with suppress(queue.Full):  # the log has it: `rookery alerts` sends it
                self._waiting.put_nowait(notice)

    def _work(self) -> None:
        log = AlertLog(self._run_dir)
        while True:
            try:
                notice = self._waiting.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                notice = None
                if not self._ended.is_set():
                    continue
            if notice is None:
                return
            try:
                results = deliver(notice, self._config, log, self._name, self._run_dir)
            except Exception as error:  # a mistake here must not end the thread
                results = {"alerts": f"{type(error).__name__}"}
            for channel, problem in results.items():
                if problem is not None and channel not in self._failed:
                    self._failed.add(channel)
                    with suppress(Exception):  # a log that is closed by now
                        self._on_event("alert_failed", channel=channel, reason=problem)


def _bounded(value: Any, depth: int = 0) -> Any:
    """Cut what a person cannot read anyway: long texts and lists, deep trees."""
    if isinstance(value, str):
        text = value if len(value) <= _MOST_TEXT else value[:_MOST_TEXT] + "..."
        return "".join(each if each.isprintable() or each == "\n" else " " for each in text)
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth >= _MOST_DEPTH:
        return "..."
    if isinstance(value, Mapping):
        return {str(key)[:100]: _bounded(item, depth + 1) for key, item in list(value.items())[:_MOST_ENTRIES]}
    if isinstance(value, Sequence):
        return [_bounded(item, depth + 1) for item in value[:_MOST_ENTRIES]]
    return str(value)[:_MOST_TEXT]
