"""The probes of a step record: which are numbers, and what of those that are one number a tensor the plots show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitoring.reading.columns import as_float, as_floats
from monitoring.runlog import Record

PARTS = ("prelude", "adapter", "core", "coda", "embedding", "head")
"""The parts of the model that share the squared gradient norm."""

_PLAIN = (
    "initial_rms",
    "injected_rms",
    "first_jump",
    "contraction",
    "token_correlation",
    "effective_rank",
    "hidden_correlation",
    "hidden_norm",
    "state_norm",
    "state_minus_input",
    "state_change",
    "reference_residual",
)
_GROUPS = {
    "gradient_share": PARTS,
    "weight_norm": ("core", "embedding", "model"),
    "depth_gain": ("shallow", "deep", "depth"),
}
_TENSORS = ("optimizer_rms", "update_ratio", "effective_rate")
_MOST_TENSORS = 4096

PROBE_NAMES = (
    *_PLAIN,
    *(f"{field}.{name}" for field, names in _GROUPS.items() for name in names),
    *(f"{field}.{part}" for field in _TENSORS for part in ("max", "median")),
    "optimizer_rms.tensor",
    "final_rms",
    "final_residual",
)
"""Probes that are one number: fields of a record, `field.part`, the extremes over tensors, the last iteration's."""

PROBE_FIELDS = frozenset({*_PLAIN, *_GROUPS, *_TENSORS, "state_rms", "relative_residual", "nodes", "validation"})
"""Fields of which one makes a record one with probes."""

_MOST_ITERATIONS = 1024


def flatten(record: Record, tensors: dict[str, int]) -> dict[str, Any]:
    """Return a record's probes that are numbers, by the names above.

    Args:
        record: a step record.
        tensors: numbers of tensor names; new names are added.
    """
    found: dict[str, Any] = {name: record[name] for name in _PLAIN if name in record}
    for field, names in _GROUPS.items():
        if isinstance(group := record.get(field), dict):
            found |= {f"{field}.{name}": group[name] for name in names if name in group}
    for field in _TENSORS:
        if isinstance(group := record.get(field), dict) and group:
            found |= _extremes(field, group, tensors)
    for name, field in (("final_rms", "state_rms"), ("final_residual", "relative_residual")):
        if isinstance(values := record.get(field), list) and values:
            found[name] = values[-1]
    return found


def numbers(values: Any) -> NDArray[np.float64] | None:
    """Return a list of a record as numbers, nan for what is none; None if it is no list or empty."""
    if not isinstance(values, list) or not values:
        return None
    return as_floats(values[:_MOST_ITERATIONS])


def _extremes(field: str, group: Mapping[str, Any], tensors: dict[str, int]) -> dict[str, Any]:
    try:
        ranked = sorted(group.values())
    except TypeError:  # some are no numbers, or not finite
        group = {name: number for name, value in group.items() if (number := as_float(value)) == number}
        ranked = sorted(group.values())
        if not ranked:
            return {}
    found = {f"{field}.max": ranked[-1], f"{field}.median": ranked[len(ranked) // 2]}
    if field == "optimizer_rms":
        name = max(group, key=group.__getitem__)
        if name in tensors or len(tensors) < _MOST_TENSORS:
            found["optimizer_rms.tensor"] = tensors.setdefault(name, len(tensors))
    return found
