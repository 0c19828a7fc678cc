"""RUN/alerts.jsonl: which alerts have left on which channel. Rank 0, restarts and login nodes send each once."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from monitoring.append_log import AppendLog
from monitoring.runlog import JsonlFollower, Record

ALERTS = "alerts.jsonl"

MOST_TRIES = 5
"""Times that one host tries to deliver an alert on a channel; the pauses between them double."""

_FIRST_PAUSE_SECONDS = 60.0
_SENDING_SECONDS = 600.0  # who has begun so long ago to send an alert has ended before it was sent
_LOCK_SECONDS = 5.0


class _Delivery(NamedTuple):
    state: str  # sending, sent, failed, muted
    time: float
    tries: dict[str, int]  # host -> number


class AlertLog:
    """The state of all alerts of a run, shared by everyone who sends them through a file that only grows.

    What cannot be written is remembered by this process alone: a full disk is no reason to be silent.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ALERTS
        self._follower = JsonlFollower(self._path, "id", str)
        self._deliveries: dict[tuple[str, str], _Delivery] = {}
        self._last: dict[tuple[str, str], tuple[float, str]] = {}  # key, channel -> when which alert left
        self._muted: dict[tuple[str, str], set[str]] = {}  # since then
        self._host = socket.gethostname()
        self._log: AppendLog | None = None

    def claim(self, id_: str, key: str, channel: str, cool_down: float) -> int | None:
        """Take on an alert: whoever gets a number has to send it, and to `settle` it.

        Args:
            id_: which one it is.
            key: what alerts have in common of which one is enough for a while.
            channel: on which it would leave.
            cool_down: that while, in seconds.

        Returns:
            The number of alerts with that key that were not sent since the last one was; None if this one is not to be
            sent: it has left, someone is sending it, it was tried enough, or one like it left just now.
        """
        with self._turn():
            now = time.time()
            if not self._due(self._deliveries.get((id_, channel)), now):
                return None
            left = self._last.get((key, channel))
            if left is not None and left[1] != id_ and abs(now - left[0]) < cool_down:
                self._write(id_, key, channel, "muted")
                return None
            muted = len(self._muted.get((key, channel), set()) - {id_})
            self._write(id_, key, channel, "sending")
            return muted

    def over(self, id_: str, channel: str) -> bool:
        """Whether an alert has left on a channel, or never will, as far as is known here."""
        delivery = self._deliveries.get((id_, channel))
        return delivery is not None and delivery.state in ("sent", "muted")

    def settle(self, id_: str, key: str, channel: str, problem: str | None) -> None:
        """Say that an alert has left, or why not."""
        with self._turn():
            self._write(id_, key, channel, "sent" if problem is None else "failed", problem)

    def _due(self, delivery: _Delivery | None, now: float) -> bool:
        if delivery is None:
            return True
        age = abs(now - delivery.time)
        if delivery.state == "sending":
            return age > _SENDING_SECONDS
        if delivery.state == "failed":
            tries = delivery.tries.get(self._host, 0)
            return tries == 0 or (tries < MOST_TRIES and age >= _FIRST_PAUSE_SECONDS * 2 ** (tries - 1))
        return False

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the file, where the file system can, and know what others wrote."""
        try:
            log = AppendLog(self._path)
        except OSError:  # a directory that is full or read-only
            self._log = None
            yield
            return
        self._log = log
        try:
            end = time.monotonic() + _LOCK_SECONDS
            while not _lock(log) and time.monotonic() < end:
                time.sleep(0.05)
            for record in self._follower.poll():
                self._learn(record)
            yield
        finally:
            log.close()

    def _write(self, id_: str, key: str, channel: str, state: str, problem: str | None = None) -> None:
        record: Record = {"time": time.time(), "id": id_, "key": key, "channel": channel, "state": state}
        record |= {"host": self._host, "pid": os.getpid()} | ({} if problem is None else {"problem": problem})
        if self._log is None:
            self._learn(record)
            return
        self._log.add(json.dumps(record).encode() + b"\n")
        self._log.flush()
        if self._log.problem is None:
            for own in self._follower.poll():
                self._learn(own)
        else:
            self._learn(record)

    def _learn(self, record: Record) -> None:
        texts = [record.get(name) for name in ("id", "key", "channel", "state", "host")]
        when = record.get("time")
        if not all(isinstance(text, str) for text in texts) or not isinstance(when, int | float):
            return
        id_, key, channel, state, host = map(str, texts)
        known = self._deliveries.get((id_, channel))
        tries = dict(known.tries) if known is not None else {}
        tries[host] = tries.get(host, 0) + (state == "sending")
        self._deliveries[id_, channel] = _Delivery(state, float(when), tries)
        if state == "muted":
            self._muted.setdefault((key, channel), set()).add(id_)
        elif state == "sent":
            self._muted.pop((key, channel), None)
        if state in ("sending", "sent"):
            self._last[key, channel] = (float(when), id_)
        elif state == "failed" and self._last.get((key, channel), (0.0, ""))[1] == id_:
            del self._last[key, channel]  # nothing has left: the next one like it is tried, too


def _lock(log: AppendLog) -> bool:
    try:
        fcntl.flock(log.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here: the line that says that it is being sent has to do
        return True
    return True
