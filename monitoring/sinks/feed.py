"""Other tools' views of a run, fed with the records of the run log: TensorBoard, wandb offline, Prometheus.

Rank 0 hands its records over to a thread and goes on. A sink that fails is switched off, with an event; one that is
too slow loses records, which are counted. Neither the training nor its pace depends on them.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from monitoring.errors import MonitorConfigError
from monitoring.runlog import Record
from monitoring.sinks.writers import PrometheusSink, Sink, TensorBoardSink, WandbSink

MOST_WAITING = 2000
"""Records that wait for the sinks at most; what comes when as many wait is dropped and counted."""

CLOSE_SECONDS = 30.0
"""How long the end of a run waits for its sinks."""

_IDLE_SECONDS = 0.5
_MOST_REASON = 500


@dataclass(kw_only=True)
class SinksConfig:
    """Which other tools get the records of the run log."""

    tensorboard: bool = False
    """Write RUN/tensorboard for `tensorboard --logdir`; needs the extra `sinks`."""
    wandb: bool = False
    """Write RUN/wandb for `wandb sync`, where there is a network; needs the extra `sinks`."""
    prometheus: str | None = None
    """A file /.../NAME.prom for the textfile collector of Prometheus' node exporter; null for none."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        path = self.prometheus
        if path is not None and not (path.endswith(".prom") and Path(path).is_absolute()):
            raise MonitorConfigError(
                f"monitor.sinks.prometheus: {path!r} is not the absolute path of a file NAME.prom, which the textfile"
                " collector reads; name one, or set it to null"
            )


def check_sinks(config: SinksConfig) -> None:
    """Refuse sinks that cannot work on this machine; for the rank that feeds them.

    Raises:
        MonitorConfigError: a package or a directory is missing.
    """
    for name in ("tensorboard", "wandb"):
        if getattr(config, name) and find_spec(name) is None:
            raise MonitorConfigError(
                f"monitor.sinks.{name}: the package {name} is not installed; install rookery[sinks], or set it to false"
            )
    if config.prometheus is not None and not os.access(Path(config.prometheus).parent, os.W_OK | os.X_OK):
        raise MonitorConfigError(
            f"monitor.sinks.prometheus: {Path(config.prometheus).parent} is no directory on this machine that you may"
            " write to; name the node exporter's, or set it to null"
        )


class Sinks:
    """All sinks of a run; to the one who feeds them no more than a queue.

    Args:
        makers: name -> what opens the sink, called by the thread that feeds it.
        on_event: told, by that thread, as `RunLog.event` is: `sink_off` (sink, reason), `sink_dropped` (records).

    Attributes:
        dropped: number of records and events that came while too many waited.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Sink]], on_event: Callable[..., None]) -> None:
        self.dropped = 0
        self._makers, self._on_event = dict(makers), on_event
        self._open: dict[str, Sink] = {}
        self._waiting: queue.Queue[tuple[str, Record] | None] = queue.Queue(MOST_WAITING)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sinks", daemon=True)
        if self._makers:
            self._thread.start()

    @classmethod
    def open(
        cls,
        config: SinksConfig,
        run_dir: Path,
        *,
        name: str,
        attempt: int,
        settings: Mapping[str, Any],
        on_event: Callable[..., None],
    ) -> Sinks:
        """Start the sinks that are switched on; returns at once.

        Args:
            config: which.
            run_dir: the run directory.
            name: the run's name.
            attempt: number of this launch.
            settings: the configuration of the run, for tools that show it.
            on_event: see the class.
        """
        makers: dict[str, Callable[[], Sink]] = {}
        if config.tensorboard:
            makers["tensorboard"] = partial(TensorBoardSink, run_dir / "tensorboard", attempt)
        if config.wandb:
            makers["wandb"] = partial(WandbSink, run_dir, name, attempt, _without_alerts(settings))
        if config.prometheus is not None:
            makers["prometheus"] = partial(PrometheusSink, Path(config.prometheus), name, run_dir)
        return cls(makers, on_event)

    def record(self, record: Record) -> None:
        """Hand over the record of a step, which nobody changes any more."""
        self._put("record", record)

    def event(self, event: Record) -> None:
        """Hand over an event (with `kind`), which nobody changes any more."""
        self._put("event", event)

    def close(self) -> None:
        """Let the sinks write what waits; returns after `CLOSE_SECONDS` in any case."""
        if not self._ended.is_set() and self._makers:
            self._ended.set()
            with suppress(queue.Full):  # it sees the end when nothing waits any more
                self._waiting.put_nowait(None)
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                for sink in list(self._open.values()):
                    sink.abandon()

    def _put(self, what: str, content: Record) -> None:
        if not self._makers or self._ended.is_set():
            return
        try:
            self._waiting.put_nowait((what, content))
        except queue.Full:
            self.dropped += 1

    def _work(self) -> None:
        for name, make in self._makers.items():
            with self._guard(name):
                self._open[name] = make()
        while (item := self._next()) is not None:
            for name, sink in list(self._open.items()):
                with self._guard(name):
                    (sink.record if item[0] == "record" else sink.event)(item[1])
        for name, sink in list(self._open.items()):
            with self._guard(name):
                sink.close()
        if self.dropped:
            self._say("sink_dropped", records=self.dropped)

    def _next(self) -> tuple[str, Record] | None:
        """Return what comes next, None after the end."""
        while True:
            try:
                return self._waiting.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                if self._ended.is_set():
                    return None

    @contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        """Switch a sink off that fails within the block."""
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            self._say("sink_off", sink=name, reason=f"{type(error).__name__}: {error}"[:_MOST_REASON])

    def _say(self, kind: str, **fields: Any) -> None:
        with suppress(Exception):  # a log that is closed by now
            self._on_event(kind, **fields)


def _without_alerts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out whom a run alerts and how: what goes to wandb may go anywhere."""
    monitor = settings.get("monitor")
    if not isinstance(monitor, Mapping):
        return dict(settings)
    return {**settings, "monitor": {key: value for key, value in monitor.items() if key != "alerts"}}
