"""Whether a run was healthy when it was saved, so that a rollback finds something worth going back to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

HEALTHY, SUSPECT, UNKNOWN = "healthy", "suspect", "unknown"
# Changes smaller than that are as much rounding as anything.
_LEAST_RESIDUAL = 0.01
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

    def vector(self, suspects: Sequence[str] = ()) -> dict[str, Any]:
        """Return verdict and measurements.

        Suspect: loss or gradient norm is not finite, the state is not, or successive changes of the state grow along
        the loop (contraction above 1, by more than rounding), which precedes a collapse; or a detector of the monitor
        is on its guard. Unknown: the state was not looked at in enough iterations to tell.

        Args:
            suspects: names of these detectors.
        """
        if not self._step:
            return {}
        residual, rms = (list(self._probe.get(name, [])) for name in reversed(_SERIES))
        rate = self._probe.get("contraction")
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
        if suspects:
            return {"verdict": SUSPECT, **measured, "suspects": list(suspects)}
        if rate is None:
            return {"verdict": UNKNOWN, **measured}
        grows = rate > 1.0 and residual[-1] > _LEAST_RESIDUAL
        return {"verdict": SUSPECT if grows else HEALTHY, **measured}
