"""How much of the time that a run had was spent on steps that it still stands on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import orjson

from monitoring.runlog import attempts


def useful_seconds(run_dir: Path) -> float:
    """Return the seconds of the steps that the newest record descends from, each step once.

    Steps that were replayed after a restart count once; saving, validation and starting up do not count.

    Raises:
        RunLogError: there is no such run directory.
    """
    steps: list[int] = []
    seconds: list[float] = []
    for attempt in attempts(run_dir):
        for step, duration in _read(run_dir / "metrics" / f"{attempt:04d}.jsonl"):
            # A step not after the last one means that training went back: all from there on is superseded.
            while steps and steps[-1] >= step:
                steps.pop()
                seconds.pop()
            steps.append(step)
            seconds.append(duration)
    return sum(seconds)


def _read(path: Path) -> list[tuple[int, float]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    pairs = []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):  # damaged lines are counted by the report
            record = orjson.loads(line)
            pairs.append((int(record["step"]), float(record["seconds"])))
    return pairs
