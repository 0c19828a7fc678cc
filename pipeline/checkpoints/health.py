"""Whether a run was healthy when it was saved, so that a rollback finds something worth going back to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

HEALTHY, SUSPECT, UNKNOWN = "healthy", "suspect", "unknown"
# Iterations over which the contraction is measured; before them the state is still on its way from the noise.
_FIRST, _LAST = 4, 12
_SERIES = ("state_rms", "relative_residual")


class Health:
    """What the last step and the last look at the recurrent state said."""

    def __init__(self) -> None:
        self._step: Mapping[str, Any] = {}
        self._probe: Mapping[str, Any] = {}

    def note(self, record: Mapping[str, Any]) -> None:
        """Take in the record of a completed step."""
        self._step = record
        if _SERIES[0] in record:
            self._probe = record

    def vector(self) -> dict[str, Any]:
        """Return verdict and measurements.

        Suspect: loss or gradient norm is not finite, the state is not, or successive changes of the state grow along
        the loop (contraction above 1), which precedes a collapse. Unknown: the state was not looked at in enough
        iterations to tell.
        """
        if not self._step:
            return {}
        residual, rms = (list(self._probe.get(name, [])) for name in reversed(_SERIES))
        rate = contraction(residual, rms)
        measured = {
            "loss": self._step["loss"],
            "grad_norm": self._step["grad_norm"],
            "state_rms": rms[-1] if rms else None,
            "relative_residual": residual[-1] if residual else None,
            "contraction": rate,
            "probed_at": self._probe.get("step"),
        }
        values = [value for name, value in measured.items() if value is not None and name != "probed_at"]
        if not all(math.isfinite(value) for value in values):
            # A loss is not a number where masks left nothing to train on; manifests hold JSON.
            measured = {
                name: value if value is None or math.isfinite(value) else None for name, value in measured.items()
            }
            return {"verdict": SUSPECT, **measured}
        if rate is None:
            return {"verdict": UNKNOWN, **measured}
        return {"verdict": HEALTHY if rate <= 1.0 else SUSPECT, **measured}


def contraction(relative_residual: Sequence[float], state_rms: Sequence[float]) -> float | None:
    """Return the geometric mean of |s_(i+1) - s_i| / |s_i - s_(i-1)| over iterations 4 to 12; None for fewer than 3.

    Args:
        relative_residual: |s_i - s_(i-1)| / |s_i| of every iteration.
        state_rms: root mean square of s_i of every iteration.
    """
    changes = [a * b for a, b in zip(relative_residual, state_rms, strict=True)][_FIRST - 1 : _LAST]
    if len(changes) < 3:
        return None
    if not all(math.isfinite(change) for change in changes):
        return math.inf
    if changes[0] <= 0.0 or changes[-1] <= 0.0:  # at a fixed point
        return 0.0
    return math.exp(math.log(changes[-1] / changes[0]) / (len(changes) - 1))
