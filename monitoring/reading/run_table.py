"""The step records of a run as columns: read as they grow, merged over attempts, in bounded memory.

Attempts come in the order of their numbers. A record whose step is not after the one before it means that training
went back, after a restart or by a rollback: what it supersedes is abandoned, and the rest is the current branch. So a
record is current if and only if no later one has its step or a smaller one: one pass over the steps from the end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from monitoring.reading.columns import NON_FINITE, Array, Columns, Samples, as_float, as_floats
from monitoring.reading.lines import LineReader
from monitoring.reading.probe_fields import PROBE_FIELDS, PROBE_NAMES, flatten, numbers
from monitoring.reading.series import thin
from monitoring.reading.step_records import step_record
from monitoring.runlog import Record

MOST_ROWS = 1_000_000
"""Records kept, about 100 bytes each. Of a longer run what a plot would show stays: see `RunTable._thin`."""

_STEP_FIELDS = {
    "step": "i8",
    "time": "f8",
    "tokens": "f8",
    "loss": "f8",
    "grad_norm": "f8",
    "lr": "f4",
    "seconds": "f4",
    "tokens_per_second": "f4",
    "expected_seconds": "f4",
    "branch": "i4",
    "skipped": "?",
    "n": "i4",
    "k": "i4",
    "attempt": "i4",
    "not_finite": "?",  # a loss was logged that is no number
    "superseded": "?",  # known when rows were last left out; `RunTable.current` is the answer
}
_FLOATS = ("time", "tokens", "loss", "grad_norm", "lr", "seconds", "tokens_per_second", "expected_seconds")
_MOST_DEPTH = 4096
_SAMPLES = {"state_rms": 2000, "relative_residual": 2000, "nodes": 500, "validation": 2000}
_BATCH = 1 << 20


class Progress(NamedTuple):
    """How much of the step records on disk is read.

    Attributes:
        read: bytes.
        total: bytes, torn last lines included.
        changed: whether the last poll read anything.
    """

    read: int
    total: int
    changed: bool


class RunTable:
    """The step records of all attempts of a run.

    A line that is no record, or that is longer than a megabyte, is counted and passed over.

    Args:
        run_dir: the run's directory; its metrics may not be there yet.
        most_rows: rows kept.

    Attributes:
        version: rises whenever something changes.
        damaged: number of lines that are no step record.
        newest: the newest record of the newest attempt, as logged; empty before the first.
        draws: how often each depth was drawn, over all records, replayed ones too.
        phases: seconds by phase of a step, over all records.
        left_out: number of records left out because the run is longer than `most_rows`.
        tensors: names that the probe `optimizer_rms.tensor` numbers.
    """

    def __init__(self, run_dir: Path, most_rows: int = MOST_ROWS) -> None:
        self.version = 0
        self.damaged = 0
        self.newest: Record = {}
        self.draws = np.zeros(_MOST_DEPTH + 1, dtype=np.int64)
        self.phases: Counter[str] = Counter()
        self.left_out = 0
        self.tensors: dict[str, int] = {}
        self._folder = run_dir / "metrics"
        self._most_rows = most_rows
        self._readers: dict[int, LineReader] = {}
        self._steps = Columns(_STEP_FIELDS)
        self._probes = Columns({"row": "i8"} | dict.fromkeys(PROBE_NAMES, "f4"))
        self._samples: dict[str, Samples[Any]] = {name: Samples(most) for name, most in _SAMPLES.items()}
        self._current: tuple[int, NDArray[np.bool_]] | None = None

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def names(self) -> Set[str]:
        """Names of the columns."""
        return _STEP_FIELDS.keys() | {"r", "pace"}

    @property
    def too_long(self) -> int:
        """Number of lines passed over for their length."""
        return sum(reader.too_long for reader in self._readers.values())

    @property
    def current(self) -> NDArray[np.bool_]:
        """Whether each record is one that the run still stands on."""
        if self._current is None or self._current[0] != self.version:
            later = np.full(len(self) + 1, np.iinfo(np.int64).max)
            later[:-1] = self._steps["step"]
            later = np.minimum.accumulate(later[::-1])[::-1]
            self._current = (self.version, ~self._steps["superseded"] & (self._steps["step"] < later[1:]))
        return self._current[1]

    def column(self, name: str) -> Array:
        """Return one value a record, attempts in order; nan, or 0 for whole numbers, where none was logged.

        Names: the fields of a record that are numbers, `n` and `k` of `num_steps`, `r` = n + k, `attempt`, `pace` =
        seconds / expected_seconds, and `not_finite`: a loss was logged that is no number.
        """
        if name == "r":
            return self._steps["n"] + self._steps["k"]
        if name == "pace":
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.asarray(self._steps["seconds"] / self._steps["expected_seconds"])
        return self._steps[name]

    def probe(self, name: str) -> tuple[Array, Array]:
        """Return (rows, values) of a probe that is one number; see `probe_fields.PROBE_NAMES`."""
        values = self._probes[name]
        there = ~np.isnan(values)
        return self._probes["row"][there], values[there]

    def samples(self, name: str) -> Samples[Any]:
        """Return state_rms, relative_residual (arrays), nodes (floats by host) or validation (floats by depth)."""
        return self._samples[name]

    def poll(self, budget: int = 8 << 20) -> Progress:
        """Read what is new, at most about `budget` bytes of it, oldest attempt first."""
        budget_left, total = budget, 0
        for attempt, path in _files(self._folder):
            reader = self._readers.setdefault(attempt, LineReader(path))
            try:
                size = path.stat().st_size
            except OSError:
                continue
            while budget_left > 0 and reader.offset < size:
                start = reader.offset
                self._add(attempt, reader.read(min(budget_left, _BATCH)))
                if reader.offset == start:
                    break
                budget_left -= reader.offset - start
            total += size
        read = sum(reader.offset for reader in self._readers.values())
        return Progress(read, total, budget_left < budget)

    def _add(self, attempt: int, lines: Sequence[bytes]) -> None:
        records = []
        for line in lines:
            if (record := step_record(line)) is not None:
                records.append(record)
            elif line.strip():
                self.damaged += 1
                self.version += 1
        if not records:
            return
        first = len(self)
        older = first and attempt < self._steps["attempt"][-1]
        self._steps.extend(self._columns(records, attempt))
        self._add_probes(records, first)
        self.version += 1
        if older:  # its last lines came after the next attempt's first
            self._rearrange(np.argsort(self._steps["attempt"], kind="stable"))
        else:
            self.newest = records[-1] | {"attempt": attempt}
        if len(self) > self._most_rows:
            self._thin()

    def _columns(self, records: list[Record], attempt: int) -> dict[str, Array]:
        count = len(records)
        columns: dict[str, Array] = {name: as_floats([r.get(name) for r in records]) for name in _FLOATS}
        columns["step"] = np.array([r["step"] for r in records], dtype=np.int64)
        columns["branch"] = np.nan_to_num(as_floats([r.get("branch") for r in records]), posinf=0.0, neginf=0.0)
        columns["branch"] = np.clip(columns["branch"], 0, 1 << 30)
        columns["skipped"] = np.array([r.get("skipped") is True for r in records])
        columns["attempt"] = np.full(count, attempt)
        columns["superseded"] = np.zeros(count, dtype=bool)
        columns["not_finite"] = ~np.isfinite(columns["loss"])
        for place in np.flatnonzero(columns["not_finite"]).tolist():
            loss = records[place].get("loss")  # it may just not be there, or be nonsense
            columns["not_finite"][place] = isinstance(loss, str) and loss in NON_FINITE
        columns["n"], columns["k"] = _depths([r.get("num_steps") for r in records])
        drawn = columns["n"] + columns["k"]
        several = [i for i, r in enumerate(records) if "depths" in r]
        single = np.ones(count, dtype=bool)
        for i in several:
            single[i] = not self._count(records[i]["depths"])
        self.draws += np.bincount(np.minimum(drawn[single], _MOST_DEPTH), minlength=_MOST_DEPTH + 1)
        for record in records:
            if isinstance(phases := record.get("phases"), dict):
                for name, seconds in phases.items():
                    if (
                        type(seconds) is float
                        and 0.0 <= seconds < 1e9
                        and (name in self.phases or len(self.phases) < 32)
                    ):
                        self.phases[name] += seconds  # type: ignore[assignment]
        return columns

    def _count(self, depths: Any) -> bool:
        """Count the depths of a step that drew several; False if they cannot be read."""
        if not isinstance(depths, dict):
            return False
        for r, count in depths.items():
            if r.isdecimal() and int(r) <= _MOST_DEPTH and type(count) is int and 0 <= count < 1 << 31:
                self.draws[int(r)] += count
        return True

    def _add_probes(self, records: list[Record], first: int) -> None:
        probed: list[dict[str, Any]] = []
        rows = []
        for row, record in enumerate(records, start=first):
            if PROBE_FIELDS.isdisjoint(record):
                continue
            probed.append(flatten(record, self.tensors))
            rows.append(row)
            for name in ("state_rms", "relative_residual"):
                if (values := numbers(record.get(name))) is not None:
                    self._samples[name].add(row, values)
            for name in ("nodes", "validation"):
                if isinstance(named := record.get(name), dict):
                    floats = {key: as_float(value) for key, value in list(named.items())[:8192]}
                    self._samples[name].add(row, {key: value for key, value in floats.items() if math.isfinite(value)})
        if rows:
            columns: dict[str, Array] = {name: as_floats([p.get(name) for p in probed]) for name in PROBE_NAMES}
            self._probes.extend(columns | {"row": np.array(rows)})

    def _rearrange(self, order: Array) -> None:
        """Keep these rows, in this order, and let the probes point at their new places."""
        places = np.full(len(self), -1)
        places[order] = np.arange(len(order))
        self._steps.keep(order)
        moved = places[self._probes["row"]]
        self._probes["row"][:] = moved
        by_row = np.argsort(moved, kind="stable")
        self._probes.keep(by_row[moved[by_row] >= 0])
        for samples in self._samples.values():
            pairs = sorted(zip(places[samples.rows].tolist(), samples.values, strict=True), key=lambda pair: pair[0])
            samples.rows, samples.values = [row for row, _ in pairs], [value for _, value in pairs]

    def _thin(self) -> None:
        """Leave out about half of the rows: as in a plot, the extremes of loss and gradient norm stay."""
        self._steps["superseded"][:] = ~self.current
        places = np.arange(len(self))
        kept = [np.array(samples.rows, dtype=np.int64) for samples in self._samples.values()]
        for name in ("loss", "grad_norm"):
            there = np.flatnonzero(np.isfinite(self._steps[name]))
            if len(there):
                kept.append(there[thin(there, self._steps[name][there], self._most_rows // 4)])
        before = len(self)
        kept.append(np.flatnonzero(self._steps["skipped"] | self._steps["not_finite"])[-self._most_rows // 8 :])
        rows = np.unique(np.concatenate([*kept, places[-1:]]))
        self._rearrange(rows)
        self.left_out += before - len(self)
        self.version += 1


def _files(folder: Path) -> list[tuple[int, Path]]:
    return sorted((int(path.stem), path) for path in folder.glob("*.jsonl") if path.stem.isdecimal())


def _depths(drawn: list[Any]) -> tuple[Array, Array]:
    """Return n and k of `num_steps`; 0 where there is none."""
    try:
        pairs = np.array(drawn, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        pairs = np.empty((0, 0), dtype=np.int64)
    if pairs.shape != (len(drawn), 2):
        good = [isinstance(d, list) and len(d) == 2 and all(type(part) is int for part in d) for d in drawn]
        pairs = np.array([d if fine else [0, 0] for d, fine in zip(drawn, good, strict=True)], dtype=np.float64)
    pairs = np.clip(pairs, 0, 1 << 20).astype(np.int32)
    return pairs[:, 0], pairs[:, 1]
