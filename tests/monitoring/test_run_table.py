"""The run table reads what runs leave behind: in pieces, torn, written twice, far too long."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.reading.columns import Samples
from monitoring.reading.lines import MOST_LINE, LineReader
from monitoring.reading.run_reader import RunReader, read_runs
from monitoring.reading.run_table import RunTable
from monitoring.runlog import RunLog, RunLogError
from tests.monitoring.plain_branches import branches
from tests.monitoring.sample_run import build_long_run, build_run, step_record


def _write(run_dir: Path, attempt: int, *records: dict[str, Any], end: str = "\n") -> Path:
    path = run_dir / "metrics" / f"{attempt:04d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n".join(json.dumps(record) for record in records) + end)
    return path


def _read(run_dir: Path, budget: int = 8 << 20, **options: int) -> RunTable:
    table = RunTable(run_dir, **options)
    while table.poll(budget).changed:
        pass
    return table


def _current(table: RunTable) -> list[tuple[int, int]]:
    rows = np.flatnonzero(table.current)
    return list(zip(table.column("attempt")[rows].tolist(), table.column("step")[rows].tolist(), strict=True))


@given(histories=st.lists(st.lists(st.integers(1, 12), max_size=12), max_size=4))
def test_the_current_branch_is_that_of_the_readers_of_records(
    histories: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    for attempt, steps in enumerate(histories, start=1):
        if steps:
            _write(run_dir, attempt, *({"step": step} for step in steps))
    table = _read(run_dir)
    current, abandoned = branches(run_dir)
    assert _current(table) == [(record["attempt"], record["step"]) for record in current]
    assert int((~table.current).sum()) == len(abandoned)


def test_every_field_comes_back_however_small_the_pieces(tmp_path: Path) -> None:
    run_dir = build_run(tmp_path / "run")
    # A poll reads whole chunks, so that a budget of one byte is a chunk at a time.
    table = _read(run_dir, budget=1)
    rows = np.flatnonzero(table.current)
    assert table.column("step")[rows].tolist() == list(range(1, 101))
    for name in ("loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second"):
        assert table.column(name)[rows].tolist() == pytest.approx([step_record(s)[name] for s in range(1, 101)])
    assert table.column("r")[rows].tolist() == [sum(step_record(s)["num_steps"]) for s in range(1, 101)]
    assert (table.newest["step"], table.newest["attempt"]) == (100, 2)
    assert table.samples("state_rms").values[-1].tolist() == pytest.approx(step_record(100)["state_rms"])
    assert table.draws.sum() == len(table) == 110


def test_a_poll_returns_what_was_completed_since_the_last(tmp_path: Path) -> None:
    table = RunTable(tmp_path)
    assert table.poll() == (0, 0, False)
    path = _write(tmp_path, 1, {"step": 1}, {"step": 2}, end="")
    assert table.poll() == (len('{"step": 1}\n'), path.stat().st_size, True)
    assert (len(table), table.poll().changed) == (1, False)
    _write(tmp_path, 1, {}, end="")
    with path.open("ab") as file:
        file.write(b"\n")
    assert table.poll().changed  # step 2 is garbled now: it is counted
    assert (len(table), table.damaged) == (1, 1)
    _write(tmp_path, 1, {"step": 2})
    assert (table.poll().changed, len(table), table.damaged) == (True, 2, 1)


def test_late_lines_of_an_older_attempt_take_their_place(tmp_path: Path) -> None:
    _write(tmp_path, 1, {"step": 1}, {"step": 2, "contraction": 0.2, "state_rms": [2.0]})
    _write(tmp_path, 2, {"step": 2}, {"step": 3, "contraction": 0.3, "state_rms": [3.0]})
    table = RunTable(tmp_path)
    table.poll()
    _write(tmp_path, 1, {"step": 3, "contraction": 0.13, "state_rms": [13.0]})
    table.poll()
    assert table.column("attempt").tolist() == [1, 1, 1, 2, 2]
    assert _current(table) == [(1, 1), (2, 2), (2, 3)]
    rows, values = table.probe("contraction")
    assert dict(zip(table.column("step")[rows], values.round(2), strict=True)) == pytest.approx({2: 0.2, 3: 0.3})
    assert rows.tolist() == [1, 2, 4] == table.samples("state_rms").rows
    assert [values.tolist() for values in table.samples("state_rms").values] == [[2.0], [13.0], [3.0]]
    assert table.newest["attempt"] == 2


def test_a_rollback_within_an_attempt_leaves_an_abandoned_branch(tmp_path: Path) -> None:
    records = [{"step": s, "branch": 0} for s in (1, 2, 3, 4)] + [{"step": s, "branch": 1} for s in (3, 4, 5)]
    _write(tmp_path, 1, *records)
    (view,) = read_runs([tmp_path])
    table = view.table
    assert table.column("step")[view.rows()].tolist() == [1, 2, 3, 4, 5]
    assert table.column("branch")[view.rows()].tolist() == [0, 0, 1, 1, 1]
    assert table.column("step")[view.rows(abandoned=True)].tolist() == [3, 4]
    assert view.warnings == []
    assert view.replay_difference() is None  # the same numbers, but other data


def test_two_writers_a_clock_set_back_and_a_missing_attempt_are_said(tmp_path: Path) -> None:
    interleaved = [
        {"step": s, "time": 1000.0 + s} for pair in zip(range(50, 60), range(20, 30), strict=True) for s in pair
    ]
    _write(tmp_path, 1, *interleaved)
    _write(tmp_path, 4, {"step": 30, "time": 400.0})
    (view,) = read_runs([tmp_path])
    assert view.table.column("step")[view.rows()].tolist() == list(range(20, 31))
    writers, missing, clock = (
        next(text for text in view.warnings if word in text) for word in ("two jobs", "no trace", "clock")
    )
    assert "go back 10 times within attempt 1 without a rollback" in writers
    assert "attempts 2, 3 left no trace" in missing
    assert "set back by 629 s at step 30" in clock


def test_a_line_without_end_is_passed_over_in_bounded_memory(tmp_path: Path) -> None:
    path = _write(tmp_path, 1, {"step": 1})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "x": "' + b"x" * (3 * MOST_LINE))
    reader = LineReader(path)
    assert reader.read(64 << 20) == [b'{"step": 1}']
    assert reader.too_long == 1
    with path.open("ab") as file:
        file.write(b'"}\n{"step": 3}\n' + b"y" * (MOST_LINE + 1) + b'\n{"step": 4}\n')
    table = _read(tmp_path, budget=1 << 20)
    assert table.column("step").tolist() == [1, 3, 4]
    assert (table.too_long, table.damaged) == (2, 0)
    (view,) = read_runs([tmp_path])
    assert "2 lines of over a megabyte in the log skipped" in view.warnings


def test_values_of_any_kind_are_read_or_left_out(tmp_path: Path) -> None:
    wrong: list[Any] = [None, "text", [], {}, [None], True, -1, 10**40, "nan", "inf", [[1], 2], [1, "x", "inf"]]
    fields = ("loss", "tokens", "num_steps", "depths", "branch", "skipped", "phases", "state_rms", "gradient_share",
              "optimizer_rms", "update_ratio", "nodes", "validation", "contraction", "time")  # fmt: skip
    records: list[dict[str, Any]] = [{"step": s} | dict.fromkeys(fields, value) for s, value in enumerate(wrong, 1)]
    records += [{"step": 100, "optimizer_rms": {"a": "nan", "b": 3.0, "c": None, "d": 1.0}, "nodes": {"n": "x"}}]
    records += [{"step": 101, "loss": "nan"}, {"step": 102, "loss": 2.5}, {"step": "103"}, {"step": 0}, {"step": 1.5}]
    _write(tmp_path, 1, *records, end='\n[1]\n"x"\nnull\n')
    table = _read(tmp_path)
    assert table.damaged == 6
    assert table.column("loss")[-1] == pytest.approx(2.5)
    assert table.column("not_finite")[-3:].tolist() == [False, True, False]
    rows, largest = table.probe("optimizer_rms.max")
    assert (table.column("step")[rows[-1]], largest[-1]) == (100, 3.0)
    assert list(table.tensors) == ["b"]


def test_a_run_too_long_for_memory_keeps_its_extremes_and_its_branches(tmp_path: Path) -> None:
    spikes = {777: 50.0, 1234: 60.0, 1801: 70.0}
    records = [{"step": s, "loss": spikes.get(s, 1.0), "tokens": s, "state_rms": [float(s)]} for s in range(1, 2001)]
    _write(tmp_path, 1, *records)
    _write(tmp_path, 2, *({"step": s, "loss": 2.0, "tokens": s} for s in range(1501, 4001)))
    table = _read(tmp_path, most_rows=1000)
    assert len(table) <= 4000  # the samples of states stay, of which there are at most 2000 a field
    assert table.left_out == 4500 - len(table) > 0
    current = dict(zip(table.column("step")[table.current], table.column("loss")[table.current], strict=True))
    assert {step: current[step] for step in (777, 1234)} == {777: 50.0, 1234: 60.0}
    assert all(current[step] == 2.0 for step in current if step > 1500)
    states = table.samples("state_rms")
    assert [table.column("step")[row] for row in states.rows] == [values[0] for values in states.values]


@given(count=st.integers(1, 300), most=st.integers(2, 20))
def test_samples_stay_few_even_and_up_to_date(count: int, most: int) -> None:
    samples: Samples[int] = Samples(most)
    for i in range(count):
        samples.add(i, i)
    assert samples.rows == samples.values == sorted(set(samples.rows))
    assert len(samples.rows) <= most + 1
    assert (samples.rows[0], samples.rows[-1]) == (0, count - 1)
    distances = np.diff(samples.rows[:-1])
    assert len(set(distances.tolist())) <= 1


def test_a_reader_follows_everything_a_run_leaves(tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match="no run directory"):
        RunReader(tmp_path / "nowhere")
    run_dir = tmp_path / "run"
    log = RunLog.open(run_dir)
    (run_dir / "eval").mkdir()
    reader = RunReader(run_dir)
    assert reader.poll().changed  # the attempt
    assert not reader.poll().changed
    for change in (
        lambda: log.step(step_record(1)),
        lambda: log.event("skip", step=1, detector="loss_spike"),
        lambda: log.outcome(0, "done"),
        lambda: (run_dir / "eval" / "step-1.json").write_text('{"step": 1, "loss": {"4": 2}}'),
    ):
        change()
        assert reader.poll().changed
        assert not reader.poll().changed
    view = reader.view()
    assert (view.last["step"], view.best, len(view.incidents)) == (1, (2.0, 4, 1), 1)
    assert view.attempts[0].ending == "finished: done"


def test_a_part_of_a_run_can_be_looked_at(tmp_path: Path) -> None:
    (view,) = read_runs([build_long_run(tmp_path / "run", steps=2000)])
    part = view.between("step", 1150, 1250)
    assert part.table.column("step")[part.rows()].tolist() == list(range(1150, 1251))
    assert part.table.column("step")[part.rows(abandoned=True)].tolist() == list(range(1200, 1251))
    rows, _ = part.probe("contraction")
    assert part.table.column("step")[rows].tolist() == list(range(1150, 1251, 10))
    assert len(view.rows()) == 2000


def test_probes_of_a_full_record_are_all_there(tmp_path: Path) -> None:
    (view,) = read_runs([build_long_run(tmp_path / "run", steps=2000)])
    for name in ("first_jump", "gradient_share.core", "weight_norm.model", "depth_gain.deep", "update_ratio.median"):
        rows, values = view.probe(name)
        assert len(rows) >= 20, name
        assert np.isfinite(values).all(), name
    steps, correlation = view.probe("token_correlation", abandoned=True)
    assert len(steps) > 5
    assert math.isclose(correlation.max(), 0.9, rel_tol=1e-6)  # the fall that the run went back from
    assert max(value["node007"] for _, value in view.samples("nodes")) == pytest.approx(1.32)
    assert view.table.phases["forward"] > 0.0
