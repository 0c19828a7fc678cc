"""Step records as they lie on the disk: what counts as one, for every reader, and the ends of a long file of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from monitoring.runlog import Record

END_BYTES = 64 << 10
"""How much of each end of a file is looked at."""


def step_record(line: bytes) -> Record | None:
    """Return the record of a step, None if the line is none: its `step` is a whole number, the first is 1."""
    try:
        record: Record = orjson.loads(line)
        step = record["step"]
    except (ValueError, TypeError, KeyError, IndexError):
        return None
    return record if type(step) is int and 1 <= step < 1 << 62 else None


@dataclass
class Ends:
    """What the two ends of a file of step records say.

    Attributes:
        first: its first record.
        newest: its last ones, in order; those at its beginning if its end has none.
        problem: why they say less than they should, in words; None if they do not.
    """

    first: Record | None = None
    newest: list[Record] = field(default_factory=list)
    problem: str | None = None


def read_ends(path: Path, most: int = END_BYTES) -> Ends:
    """Return what the ends of a file of step records say, `most` bytes each; one that cannot be read says nothing."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(most)
            file.seek(max(0, size - most))
            tail = file.read(most)
    except OSError:
        return Ends()
    first = next(_records(head.split(b"\n")[:-1]), None)
    newest = list(_records(tail.split(b"\n")[1 if size > most else 0 : -1]))
    if newest or size <= most:
        return Ends(first, newest)
    problem = f"its last {most >> 10} kB, of {size / 1e9:.2f} GB, hold no step: what is newest is not known"
    return Ends(first, list(_records(head.split(b"\n")[:-1])), problem)


def _records(lines: Iterable[bytes]) -> Iterator[Record]:
    return (record for line in lines if (record := step_record(line)) is not None)
