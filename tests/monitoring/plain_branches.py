"""The branches of a run the plain way, record by record: what the run table and the ledger are measured against."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from monitoring.runlog import Record, attempts, read_attempt


class Branches(NamedTuple):
    """The step records of a run.

    Attributes:
        current: what the newest record descends from, sorted by step, each step once.
        abandoned: the rest, in the order in which they were superseded.
    """

    current: list[Record]
    abandoned: list[Record]


def branches(run_dir: Path) -> Branches:
    """Return the run's step records, split into the current branch and abandoned ones."""
    current: list[Record] = []
    abandoned: list[Record] = []
    for attempt in attempts(run_dir):
        for record in read_attempt(run_dir, attempt):
            left = len(current)
            while left and current[left - 1]["step"] >= record["step"]:
                left -= 1
            abandoned += current[left:]
            del current[left:]
            current.append(record)
    return Branches(current, abandoned)
