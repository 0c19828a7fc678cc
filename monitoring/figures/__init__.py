"""The panels of the report and of the live page as Plotly figures: plain dictionaries, drawn by `assets/plots.js`."""

from __future__ import annotations

from collections.abc import Sequence

from monitoring.figures.depth import depth_panels
from monitoring.figures.loss import loss_panels
from monitoring.figures.machine import machine_panels
from monitoring.figures.optimization import optimization_panels
from monitoring.figures.panel import Panel
from monitoring.figures.recurrence import recurrence_panels
from monitoring.reading.runview import RunView

__all__ = ["Panel", "panels"]


def panels(runs: Sequence[RunView]) -> list[Panel]:
    """Return every panel of the page, in its order; one without data says what is missing.

    The keys are the same for every single run, and for every comparison.
    """
    return [
        *loss_panels(runs),
        *depth_panels(runs),
        *optimization_panels(runs),
        *recurrence_panels(runs),
        *machine_panels(runs),
    ]
