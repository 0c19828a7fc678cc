"""What a build will do, unit by unit, before it does any of it: a function of the inputs and the settings alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from data_prep.readers import ReaderOptions, WorkItem
from data_prep.readers.items import MEBIBYTE
from data_prep.readers.planning import SourceFile, cut, find_sources, whole_item
from data_prep.world import World

_SMALLEST_UNIT, _LARGEST_UNIT = MEBIBYTE // 2, 256 * MEBIBYTE  # of text; the largest bounds the memory of a rank
_UNITS_IF_POSSIBLE = 1024  # enough to share out evenly, few enough to keep shards large
# A unit costs about 30 ms (metadata of an array, six fsyncs), as long as encoding 2 MB takes.
_CHEAP_UNIT, _FEWEST_UNITS = 16 * MEBIBYTE, 64
_ITEMS_PER_UNIT = 4  # a file is cut finer than units, so that units come out even
_TEXT_BYTES_PER_TOKEN = 4  # typical; only the size of units depends on it
_ROWS_PER_UNIT = 64  # at least, so that dropped tails stay under 1 % of the tokens

T = TypeVar("T")


@dataclass(frozen=True)
class Unit:
    """Work of one rank that becomes one part of the dataset, or several where the text is more than was expected.

    Attributes:
        index: its place in the plan, and the number of its part.
        items: what it reads, in order.
        planned_bytes: the text that all units were cut to.
    """

    index: int
    items: tuple[WorkItem, ...]
    planned_bytes: int

    @cached_property
    def bytes(self) -> int:
        """Text to expect, bytes."""
        return sum(item.bytes for item in self.items)

    @cached_property
    def key(self) -> str:
        """Digest of what it reads: a finished unit with another key has read something else."""
        content = [self.planned_bytes, *(astuple(item) for item in self.items)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """All units of a build.

    Attributes:
        units: in the order of their parts.
        unit_bytes: the size that they were cut to.
    """

    units: tuple[Unit, ...]
    unit_bytes: int

    @cached_property
    def bytes(self) -> int:
        """Text to expect, bytes."""
        return sum(unit.bytes for unit in self.units)

    @cached_property
    def key(self) -> str:
        """Digest of what all units read."""
        return hashlib.sha256("".join(unit.key for unit in self.units).encode()).hexdigest()

    def as_record(self) -> dict[str, Any]:
        """Return the plan as JSON stores it; see `from_record`."""
        return {
            "unit_bytes": self.unit_bytes,
            "units": [[list(astuple(item)) for item in unit.items] for unit in self.units],
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Plan:
        """Return the plan that `as_record` has made.

        Raises:
            KeyError, TypeError, ValueError: `record` is something else.
        """
        units = tuple(
            Unit(index, tuple(WorkItem(*item) for item in items), int(record["unit_bytes"]))
            for index, items in enumerate(record["units"])
        )
        return cls(units, int(record["unit_bytes"]))


def make_plan(
    inputs: Sequence[Path], options: ReaderOptions, sequence_length: int, unit_bytes: int | None, world: World
) -> Plan:
    """Look at every input and cut it into units; a collective, the ranks share the looking among themselves.

    Args:
        inputs: see `data_prep.corpus.find_files`.
        options: how files are read.
        sequence_length: tokens a row trains on.
        unit_bytes: text in a unit, bytes; chosen from the size of the corpus if None.
        world: the ranks.

    Raises:
        DataError: an input does not exist, holds nothing, is damaged or lacks the column.
    """
    with world.guard("find inputs"):
        sources: list[SourceFile] = find_sources(inputs) if world.rank == 0 else []
    sources = world.broadcast(sources)
    with world.guard("look at inputs"):
        described = [whole_item(source, options) for source in sources[world.rank :: world.size]]
    whole = _merged(world.allgather(described))
    unit_bytes = unit_bytes or _unit_bytes(sum(item.bytes for item in whole), sequence_length)
    with world.guard("plan"):
        mine = [cut(item, options, max(1, unit_bytes // _ITEMS_PER_UNIT)) for item in whole[world.rank :: world.size]]
    items = (item for of_file in _merged(world.allgather(mine)) for item in of_file)
    return Plan(tuple(_units(items, unit_bytes)), unit_bytes)


def _merged(of_ranks: Sequence[Sequence[T]]) -> list[T]:
    """Undo a distribution in which rank r had the elements r, r + size, ..."""
    ranks = len(of_ranks)
    return [of_ranks[index % ranks][index // ranks] for index in range(sum(map(len, of_ranks)))]


def _unit_bytes(total: int, sequence_length: int) -> int:
    """Return a power of two, so that a small change of the corpus leaves most units as they were."""
    smallest = max(_SMALLEST_UNIT, _ROWS_PER_UNIT * (sequence_length + 1) * _TEXT_BYTES_PER_TOKEN)
    cheap = min(total // _FEWEST_UNITS, _CHEAP_UNIT)
    wanted = max(smallest, cheap, min(total // _UNITS_IF_POSSIBLE, _LARGEST_UNIT))
    return 1 << (wanted - 1).bit_length()


def _units(items: Iterable[WorkItem], unit_bytes: int) -> Iterable[Unit]:
    """Collect items, in order, until a unit is full; a last one of less than half the size joins the one before."""
    full: list[list[WorkItem]] = []
    size = 0
    for item in items:
        if not full or size >= unit_bytes:
            full.append([])
            size = 0
        full[-1].append(item)
        size += item.bytes
    if len(full) > 1 and 2 * size < unit_bytes:
        last = full.pop()
        full[-1] += last
    return (Unit(index, tuple(unit), unit_bytes) for index, unit in enumerate(full))
