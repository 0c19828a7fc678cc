"""The sinks, read back by the tools they are for."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from monitoring.errors import MonitorConfigError
from monitoring.runlog import Record
from monitoring.sinks import feed, writers
from monitoring.sinks.feed import Sinks, SinksConfig, check_sinks
from monitoring.sinks.writers import PrometheusSink, Sink, WandbSink, numbers

SETTINGS = {"seed": 1, "monitor": {"mode": "act", "alerts": {"webhook": {"url": "https://secret.example.org"}}}}


def _record(step: int, **fields: Any) -> Record:
    return {
        "step": step,
        "time": 1_700_000_000.0 + step,
        "sample_hash": "ab",
        "loss": 2.0 + step / 100,
        "num_steps": [5, 3],
        "branch": 0,
        "attempt": 1,
        "state_rms": [1.0, 2.0, 3.5],
        "validation": {"1": 3.0, "8": 2.5},
        **fields,
    }


def _feed(run_dir: Path, config: SinksConfig, records: list[Record], attempt: int = 1) -> list[tuple[str, Any]]:
    events: list[tuple[str, Any]] = []
    sinks = Sinks.open(
        config,
        run_dir,
        name="a run",
        attempt=attempt,
        settings=SETTINGS,
        on_event=lambda kind, **fields: events.append((kind, fields)),
    )
    for record in records:
        sinks.record(record)
    sinks.close()
    return events


def _curve(run_dir: Path, tag: str) -> dict[int, float]:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    points = accumulator.Scalars(tag)
    assert [point.step for point in points] == sorted({point.step for point in points})
    return {point.step: round(point.value, 4) for point in points}


def test_the_numbers_of_a_record_are_named() -> None:
    record = _record(1, slowest={"rank": 3, "host": "n1", "ratio": 1.5}, text="x", empty=[])
    found = {(name, item): value for name, item, value in numbers(record)}
    assert found["loss", ""] == 2.01
    assert found["num_steps", "no_grad"] == 5
    assert found["num_steps", "grad"] == 3
    assert found["state_rms", "last"] == 3.5
    assert found["validation", "8"] == 2.5
    assert found["slowest", "ratio"] == 1.5
    assert not {name for name, _ in found} & {"text", "empty", "sample_hash"}


def test_tensorboard_shows_the_newest_branch_alone_after_restarts_and_rollbacks(tmp_path: Path) -> None:
    config = SinksConfig(tensorboard=True)
    _feed(tmp_path, config, [_record(step) for step in range(1, 31)])
    # A restart from step 20, then a rollback within the process to step 22, before step 28 was replayed.
    again = [_record(step, loss=5.0) for step in range(21, 27)]
    again += [_record(step, loss=7.0, branch=1) for step in range(23, 25)]
    assert _feed(tmp_path, config, again, attempt=2) == []
    expected = {step: 2.0 + step / 100 for step in range(1, 21)} | {21: 5.0, 22: 5.0, 23: 7.0, 24: 7.0}
    assert _curve(tmp_path, "loss") == pytest.approx(expected)
    assert _curve(tmp_path, "validation/8")[24] == 2.5


def test_tensorboard_keeps_the_order_of_attempts_where_the_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, now = SinksConfig(tensorboard=True), time.time()
    _feed(tmp_path, config, [_record(step) for step in range(1, 11)])
    monkeypatch.setattr(time, "time", lambda: now - 86400.0)
    _feed(tmp_path, config, [_record(step, loss=9.0) for step in range(6, 8)], attempt=2)
    assert list(_curve(tmp_path, "loss")) == [1, 2, 3, 4, 5, 6, 7]
    assert _curve(tmp_path, "loss")[7] == 9.0


def _wandb_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The history rows of an offline run: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    data, at, piece = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(piece)
            piece = b""
            if record.HasField("history"):
                yield {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }


def test_wandb_gets_a_run_a_branch_that_never_goes_back_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "CLOSE_SECONDS", 120.0)  # a busy machine imports slowly
    monkeypatch.setattr(writers, "_WANDB_CLOSE_SECONDS", 100.0)
    config = SinksConfig(wandb=True)
    (tmp_path / "id").write_text("0123456789abcdef\n")
    _feed(tmp_path, config, [_record(step) for step in range(1, 7)])
    again = [_record(step) for step in range(4, 9)] + [_record(step, branch=1, loss=7.0) for step in range(5, 7)]
    assert _feed(tmp_path, config, again, attempt=2) == []
    steps: dict[str, list[int]] = {}
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb")):
        assert b"secret.example.org" not in path.read_bytes()
        for row in _wandb_rows(path):
            steps.setdefault(path.stem[-2:], []).append(row["_step"])
            assert row["loss"] == (7.0 if path.stem.endswith("b1") else 2.0 + row["_step"] / 100)
            assert row["validation/8"] == 2.5
    assert steps == {"b0": [1, 2, 3, 4, 5, 6, 7, 8], "b1": [5, 6]}


def test_a_wandb_that_hangs_or_dies_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "CLOSE_SECONDS", 0.5)
    sink = WandbSink(tmp_path, "a run", 1, {})
    os.kill(sink._process.pid, signal.SIGSTOP)
    sinks = Sinks({"wandb": lambda: sink}, lambda kind, **fields: None)
    sinks.record(_record(1))
    sinks.close()
    assert sink._process.wait(5.0) == -signal.SIGKILL
    events = []
    dies = WandbSink(tmp_path, "a run", 2, {})
    sinks = Sinks({"wandb": lambda: dies}, lambda kind, **fields: events.append((kind, fields["sink"])))
    os.kill(dies._process.pid, signal.SIGUSR2)
    os.kill(dies._process.pid, signal.SIGKILL)
    dies._process.wait(5.0)
    sinks.record(_record(1))
    sinks.close()
    assert events == [("sink_off", "wandb")]


def test_the_prometheus_file_is_valid_and_keeps_what_is_measured_rarely(tmp_path: Path) -> None:
    path = tmp_path / "run.prom"
    sink = PrometheusSink(path, 'a "run"\\n', tmp_path)
    tensors = {f"layer.{number}": float(number) for number in range(1, 6)}
    more = {"optimizer_rms": tensors | {"odd": "nan"}, "odd-name": 1}
    sink.record(_record(1, contraction=0.5, nodes={"node-1": 1.25}, loss=math.nan, **more))
    first = path.read_text()
    sink.record(_record(2, loss=math.inf))
    sink.event({"kind": "finding"})
    assert path.read_text() == first, "it is not written at every step"
    sink.close()
    samples = {
        (sample.name, sample.labels.get("item", ""), sample.labels["run"]): sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }
    run = 'a "run"\\n'
    assert samples["rookery_step", "", run] == 2
    assert samples["rookery_loss", "", run] == math.inf
    assert samples["rookery_contraction", "", run] == 0.5
    assert samples["rookery_nodes", "node-1", run] == 1.25
    found = {item: value for (name, item, _), value in samples.items() if name == "rookery_optimizer_rms"}
    assert found == {"max": 5.0, "median": 3.0}
    assert all(family.documentation for family in text_string_to_metric_families(path.read_text()))
    assert samples["rookery_validation", "8", run] == 2.5
    assert samples["rookery_odd_name", "", run] == 1
    assert samples["rookery_events_total", "", run] == 1
    assert math.isnan(
        next(each for each in text_string_to_metric_families(first) if each.name == "rookery_loss").samples[0].value
    )
    assert [each.name for each in tmp_path.iterdir()] == ["run.prom"]
    assert path.stat().st_mode & 0o444 == 0o444


def test_series_of_two_runs_of_one_name_do_not_collide(tmp_path: Path) -> None:
    series = []
    for place in ("one/run", "two/run"):
        path = tmp_path / f"{place[:3]}.prom"
        sink = PrometheusSink(path, "smoke", tmp_path / place)
        sink.record(_record(1))
        sink.event({"kind": "finding"})
        sink.close()
        series.append({line.rpartition(" ")[0] for line in path.read_text().splitlines() if line[0] != "#"})
    assert series[0]
    assert not series[0] & series[1]


class _Odd(Sink):
    def __init__(self, *, fails_at: int = 0, waits_for: threading.Event | None = None) -> None:
        self.seen: list[int] = []
        self._fails_at, self._waits_for = fails_at, waits_for

    def record(self, record: Record) -> None:
        if self._waits_for is not None:
            self._waits_for.wait(10.0)
        if record["step"] == self._fails_at:
            raise OSError("No space left on device")
        self.seen.append(record["step"])

    def close(self) -> None:
        self.seen.append(-1)


def test_a_sink_that_fails_is_switched_off_once_and_the_others_go_on() -> None:
    good, bad, events = _Odd(), _Odd(fails_at=3), []

    def broken() -> Sink:
        raise RuntimeError("no such thing " + "x" * 10_000)

    sinks = Sinks(
        {"broken": broken, "bad": lambda: bad, "good": lambda: good},
        lambda kind, **fields: events.append((kind, fields)),
    )
    for step in range(1, 6):
        sinks.record(_record(step))
    sinks.close()
    sinks.record(_record(6))
    sinks.close()
    assert good.seen == [1, 2, 3, 4, 5, -1]
    assert bad.seen == [1, 2]
    assert [(kind, fields["sink"]) for kind, fields in events] == [("sink_off", "broken"), ("sink_off", "bad")]
    assert "No space left" in events[1][1]["reason"]
    assert len(events[0][1]["reason"]) <= 500


def test_a_slow_sink_loses_records_and_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MOST_WAITING", 10)
    go, events = threading.Event(), []
    slow = _Odd(waits_for=go)
    sinks = Sinks({"slow": lambda: slow}, lambda kind, **fields: events.append((kind, fields)))
    started = time.monotonic()
    for step in range(1, 101):
        sinks.record(_record(step))
    assert time.monotonic() - started < 1.0
    go.set()
    sinks.close()
    assert events == [("sink_dropped", {"records": sinks.dropped})]
    assert len(slow.seen) - 1 + sinks.dropped == 100
    assert sinks.dropped >= 89


def test_a_sink_that_hangs_does_not_keep_the_run_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "CLOSE_SECONDS", 0.2)
    go = threading.Event()
    sinks = Sinks({"hangs": lambda: _Odd(waits_for=go)}, lambda kind, **fields: None)
    sinks.record(_record(1))
    started = time.monotonic()
    sinks.close()
    go.set()
    assert time.monotonic() - started < 5.0


def test_no_sink_is_no_thread_and_no_file(tmp_path: Path) -> None:
    before = threading.active_count()
    assert _feed(tmp_path, SinksConfig(), [_record(1)]) == []
    assert threading.active_count() == before
    assert not list(tmp_path.iterdir())


def _on(name: str) -> SinksConfig:
    return SinksConfig(tensorboard=name == "tensorboard", wandb=name == "wandb")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_refused_with_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_sinks(_on(name))
    monkeypatch.setattr(feed, "find_spec", lambda name: None)
    check_sinks(SinksConfig())
    with pytest.raises(MonitorConfigError, match=rf"monitor\.sinks\.{name}: .*install rookery\[sinks\]"):
        check_sinks(_on(name))


def test_a_prometheus_file_that_nobody_would_read_is_refused(tmp_path: Path) -> None:
    for path in (str(tmp_path / "run.txt"), "run.prom"):
        with pytest.raises(MonitorConfigError, match=r"monitor\.sinks\.prometheus: .*NAME\.prom"):
            SinksConfig(prometheus=path)
    with pytest.raises(MonitorConfigError, match="no directory on this machine"):
        check_sinks(SinksConfig(prometheus=str(tmp_path / "missing" / "run.prom")))
    check_sinks(SinksConfig(prometheus=str(tmp_path / "run.prom")))


def test_sinks_import_nothing_before_they_are_switched_on() -> None:
    heavy = "{'wandb', 'tensorboard', 'numpy', 'torch'}"
    code = f"import sys, monitoring.sinks.feed; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
