"""The sinks themselves: each turns records into the files of another tool, and may raise whatever it likes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from monitoring.runlog import Record, write_atomic

_FLUSH_SECONDS = 10.0
_UNSAFE = r"[^a-zA-Z0-9_]"
_MOST_SERIES = 5000
_WANDB_CLOSE_SECONDS = 25.0
_OF_TENSORS = ("optimizer_rms", "update_ratio", "effective_rate")
_HELP = {
    "step": "Completed optimizer steps.",
    "time": "When the step ended, unix seconds.",
    "loss": "Training loss of the step, nats a token.",
    "grad_norm": "Global gradient norm before clipping.",
    "lr": "Learning rate.",
    "tokens": "Tokens seen so far.",
    "seconds": "Seconds that the step took.",
    "tokens_per_second": "Tokens a second of the step.",
}
_NO_NUMBERS_OF_A_STEP = {"step", "time", "sample_hash", "attempt"}


class Sink:
    """One tool's view of a run; opened, fed and closed by the same thread."""

    def record(self, record: Record) -> None:
        """Take the record of a step."""
        raise NotImplementedError

    def event(self, event: Record) -> None:
        """Take an event; most tools have no place for it."""

    def close(self) -> None:
        """Write what waits."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Let go of what would keep running; called by another thread when this one does not come back."""


def numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield (field, item, value) of all numbers of a record; the item is empty where the field is a number.

    Of a list, one entry an iteration, the last is taken; `num_steps` has the items `no_grad` and `grad`.
    """
    for name, value in record.items():
        if isinstance(value, int | float):
            yield name, "", float(value)
        elif isinstance(value, dict):
            yield from ((name, str(key), float(item)) for key, item in value.items() if isinstance(item, int | float))
        elif name == "num_steps" and isinstance(value, list | tuple):
            yield from ((name, key, float(item)) for key, item in zip(("no_grad", "grad"), value, strict=True))
        elif isinstance(value, list) and value and isinstance(value[-1], int | float):
            yield name, "last", float(value[-1])


def _tags(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{name}/{item}" if item else name: value
        for name, item, value in numbers(record)
        if name not in _NO_NUMBERS_OF_A_STEP
    }


class TensorBoardSink(Sink):
    """RUN/tensorboard: one file of TensorBoard's events an attempt.

    A record that is not beyond the last one is preceded by the mark of a restart, at which TensorBoard forgets what it
    knew of this step and later ones. So does the first of an attempt.
    """

    def __init__(self, directory: Path, attempt: int) -> None:
        from google_crc32c import value as crc32c
        from tensorboard.compat.proto import event_pb2, summary_pb2

        self._event, self._summary, self._crc32c = event_pb2, summary_pb2, crc32c
        directory.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names, also where the clock was set back.
        times = [int(path.name.split(".")[3]) for path in directory.glob("events.out.tfevents.[0-9]*.*")]
        now = max(int(time.time()), max(times, default=0) + 1)
        name = f"events.out.tfevents.{now:010d}.{socket.gethostname()}.{os.getpid()}.{attempt}"
        self._file = (directory / name).open("xb")
        self._last: int | None = None
        self._flushed = time.monotonic()
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def record(self, record: Record) -> None:
        """Write the numbers of a step."""
        step, wall = int(record["step"]), float(record.get("time", time.time()))
        if self._last is None or step <= self._last:
            start = self._event.SessionLog(status=self._event.SessionLog.START)
            self._write(self._event.Event(wall_time=wall, step=step, session_log=start))
        self._last = step
        values = [self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in _tags(record).items()]
        self._write(self._event.Event(wall_time=wall, step=step, summary=self._summary.Summary(value=values)))
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self._flushed = time.monotonic()
            self._file.flush()

    def close(self) -> None:
        """Write what waits."""
        self._file.close()

    def _write(self, event: Any) -> None:
        """Append a record of a TFRecord file; TensorBoard's own writer computes the checksums in Python."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(length + self._checksum(length) + data + self._checksum(data))

    def _checksum(self, data: bytes) -> bytes:
        crc = self._crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


class WandbSink(Sink):
    """RUN/wandb, by a process (`wandb_process`): a wandb that hangs would keep this one from ending."""

    def __init__(self, run_dir: Path, name: str, attempt: int, settings: Mapping[str, Any]) -> None:
        (run_dir / "wandb").mkdir(exist_ok=True)
        self._said = run_dir / "wandb" / "stderr.txt"
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]);"
            " from monitoring.sinks.wandb_process import main; main(sys.argv[2])"
        )
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(Path(__file__).parents[2]), str(run_dir)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
        self._attempt = attempt
        self._send({"name": name, "settings": settings})

    def record(self, record: Record) -> None:
        """Hand on the numbers of a step."""
        values = {**_tags(record), "attempt": self._attempt}
        self._send({"step": int(record["step"]), "branch": int(record.get("branch", 0)), "values": values})

    def close(self) -> None:
        """Let it write what waits."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(_WANDB_CLOSE_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            self.abandon()
            raise
        if self._process.returncode != 0:
            raise RuntimeError(self._last_words())

    def abandon(self) -> None:
        """End it at once, with what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, content: Record) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(content, default=str).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            raise RuntimeError(self._last_words()) from None

    def _last_words(self) -> str:
        with suppress(OSError):
            lines = self._said.read_text(encoding="utf-8", errors="replace").splitlines()
            return lines[-1] if lines else f"its process ended with {self._process.poll()}"
        return "its process ended"


class PrometheusSink(Sink):
    """One file in the text format of Prometheus, replaced as a whole, for the node exporter's textfile collector.

    Every number is a gauge `rookery_FIELD{run, directory, item}` that keeps its value until it is measured again; of
    numbers by tensor the items are `max` and `median`. Events are counted from the start of the attempt on.

    Args:
        path: the file.
        name: the run's name, which several runs may have.
        run_dir: its directory, which only one has.
    """

    def __init__(self, path: Path, name: str, run_dir: Path) -> None:
        self._path, self._run = path, {"run": name, "directory": str(run_dir.resolve())}
        self._values: dict[str, dict[str, float]] = {}
        self._events: Counter[str] = Counter()
        self._series = 0
        self._due = 0.0

    def record(self, record: Record) -> None:
        """Keep the numbers of a step, and write them if the last time is long enough ago."""
        of_tensors = {f: _extremes(values) for f in _OF_TENSORS if isinstance(values := record.get(f), dict)}
        for name, item, value in numbers({**record, **of_tensors}):
            items = self._values.setdefault(name, {})
            if item not in items:
                if self._series >= _MOST_SERIES:
                    continue
                self._series += 1
            items[item] = value
        self._write(at_once=False)

    def event(self, event: Record) -> None:
        """Count an event."""
        self._events[str(event["kind"])] += 1
        self._write(at_once=False)

    def close(self) -> None:
        """Write what waits."""
        self._write(at_once=True)

    def _write(self, *, at_once: bool) -> None:
        now = time.monotonic()
        if now < self._due and not at_once:
            return
        self._due = now + _FLUSH_SECONDS
        lines = []
        for name, items in self._values.items():
            metric = "rookery_" + re.sub(_UNSAFE, "_", name)
            lines += [f"# HELP {metric} {_HELP.get(name, 'As in the step records.')}"]
            lines += [f"# TYPE {metric} gauge"]
            lines += [f"{metric}{self._labels(item=item)} {_number(value)}" for item, value in items.items()]
        if self._events:
            lines += ["# HELP rookery_events_total Events of this attempt by kind."]
            lines += ["# TYPE rookery_events_total counter"]
            lines += [f"rookery_events_total{self._labels(kind=kind)} {n}" for kind, n in self._events.items()]
        write_atomic(self._path, "".join(f"{line}\n" for line in lines).encode())
        self._path.chmod(0o644)  # the node exporter is another user

    def _labels(self, **labels: str) -> str:
        pairs = self._run | {key: value for key, value in labels.items() if value}
        return "{" + ",".join(f'{key}="{_escaped(value)}"' for key, value in pairs.items()) + "}"


def _extremes(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the highest and the median of numbers by tensor: hundreds of series that nobody would look at."""
    known = [float(value) for value in values.values() if isinstance(value, int | float)]
    return {"max": max(known), "median": statistics.median(known)} if known else {}


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(text := repr(value), text)
