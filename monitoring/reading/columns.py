"""Storage of the run table: columns of numbers that grow together, and samples that stay few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
T = TypeVar("T")

NON_FINITE = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}  # as the run log spells them


def as_floats(values: Sequence[Any]) -> NDArray[np.float64]:
    """Return the values as numbers; what is none (also None) becomes nan."""
    try:
        column = np.array(values, dtype=np.float64)  # reads None, and the strings of numbers that are not finite
    except (TypeError, ValueError, OverflowError):
        column = np.empty((0, 0))
    if column.ndim != 1:
        column = np.array([as_float(value) for value in values], dtype=np.float64)
    return column


def as_float(value: Any) -> float:
    """Return a number of the log; nan if it is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return float("nan")
    return NON_FINITE.get(value, np.nan) if isinstance(value, str) else np.nan


class Columns:
    """Columns of equal length, by name.

    Args:
        kinds: numpy type of every column.
    """

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self._arrays = {name: np.empty(1024, dtype=kind) for name, kind in kinds.items()}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name][: self._size]

    def extend(self, values: Mapping[str, Array]) -> None:
        """Append rows: one array for every column."""
        after = self._size + len(next(iter(values.values())))
        for name, column in self._arrays.items():
            target = column
            if after > len(column):
                target = np.empty(max(after, 2 * len(column)), dtype=column.dtype)
                target[: self._size] = column[: self._size]
                self._arrays[name] = target
            with np.errstate(over="ignore", invalid="ignore"):
                target[self._size : after] = values[name]
        self._size = after

    def keep(self, rows: Array) -> None:
        """Keep only these rows, in this order."""
        for name, column in self._arrays.items():
            self._arrays[name] = column[: self._size][rows]
        self._size = len(rows)


class Samples(Generic[T]):
    """At most `most` values of a series of any length, evenly spread over it, and always the newest.

    Attributes:
        rows: the row of the run table that each belongs to, ascending.
        values: the values.
    """

    def __init__(self, most: int) -> None:
        self.rows: list[int] = []
        self.values: list[T] = []
        self._most = most
        self._stride = 1
        self._added = 0

    def add(self, row: int, value: T) -> None:
        """Append a value; one that was kept only because it was the newest goes."""
        if self._added and (self._added - 1) % self._stride:
            self.rows.pop()
            self.values.pop()
        self.rows.append(row)
        self.values.append(value)
        self._added += 1
        if len(self.rows) > self._most:
            self._stride *= 2
            last = [] if len(self.rows) % 2 else [-1]
            self.rows = self.rows[::2] + [self.rows[i] for i in last]
            self.values = self.values[::2] + [self.values[i] for i in last]
