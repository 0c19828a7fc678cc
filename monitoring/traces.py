"""From a series of points to a Plotly trace, and the look that all panels share.

A colour is the name of a style-sheet variable, `var(--name)`: the page resolves it, so that one report serves light
and dark. Text of a run reaches a figure only as `meta`, already escaped, because Plotly reads some HTML in labels.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from monitoring.runview import RunView
from monitoring.series import smooth, thin

Json = dict[str, Any]

RUN_COLOURS = 8
"""Runs that the style sheet tells apart; further ones start over."""


@dataclass
class Points:
    """Points of one series, x ascending, each with the integers that its hover label shows."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    about: list[list[int | None]] = field(default_factory=list)

    def add(self, x: float, y: float, about: list[int | None]) -> None:
        """Append a point."""
        self.x.append(x)
        self.y.append(y)
        self.about.append(about)

    def thinned(self, limit: int) -> Points:
        """Return at most `limit` of the points, spikes among them."""
        kept = thin(self.x, self.y, limit)
        return Points([self.x[i] for i in kept], [self.y[i] for i in kept], [self.about[i] for i in kept])

    def smoothed(self, span: float) -> Points:
        """Return the points with y averaged over about `span` neighbours."""
        return Points(self.x, smooth(self.y, span), self.about)


def run_colour(index: int) -> str:
    """Return the colour of the run with this place on the page."""
    return f"var(--run-{index % RUN_COLOURS})"


def base_trace(index: int, run: RunView, name: str, kind: Json) -> Json:
    """Return what every trace of a run has: its name for the hover label, and the group that hides with the run."""
    return {"name": name, "meta": html.escape(run.name), "legendgroup": f"run-{index}", "showlegend": False} | kind


def line_trace(index: int, run: RunView, points: Points, name: str) -> Json:
    """Return a line in the run's colour."""
    trace = base_trace(index, run, name, {"type": "scatter", "mode": "lines", "line": {"color": run_colour(index)}})
    trace |= {"x": [short(x) for x in points.x], "y": [short(y) for y in points.y], "customdata": points.about}
    trace["hovertemplate"] = f"%{{meta}}<br>%{{x:.4~s}}: %{{y:.4g}} ({name})<extra></extra>"
    return trace


def dot_trace(index: int, run: RunView, points: Points, name: str, marker: Json) -> Json:
    """Return one dot per training step; `about` holds step, drawn depth and attempt."""
    trace = line_trace(index, run, points, name) | {"mode": "markers", "marker": marker}
    trace["hovertemplate"] = (
        "%{meta}, attempt %{customdata[2]}" + (" (superseded)" if name == "abandoned" else "") + "<br>"
        "step %{customdata[0]:,}, r = %{customdata[1]}<br>loss %{y:.4f} at %{x:.4~s} tokens<extra></extra>"
    )
    return trace


def depth_scale(depths: Sequence[int]) -> Json:
    """Return marker colours by log2 of the depth, with a colour bar labelled in depths."""
    logs = [math.log2(r) for r in depths]
    low, high = min(logs), max(logs)
    ticks = range(math.ceil(low), math.floor(high) + 1)
    bar = {"tickvals": list(ticks), "ticktext": [str(2**tick) for tick in ticks], "thickness": 8, "outlinewidth": 0}
    bar |= {"title": {"text": "r"}, "len": 0.9, "xpad": 6}
    return {
        "color": [short(log) for log in logs],
        "colorscale": [[i / 3, f"var(--depth-{i})"] for i in range(4)],
        "cmin": low,
        "cmax": high if high > low else low + 1.0,
        "colorbar": bar,
    }


def panel_layout(x_title: str, y_title: str, log_of: Sequence[float] = ()) -> Json:
    """Return the common layout; with `log_of`, the values shown, the y axis is logarithmic."""
    axis = {
        "gridcolor": "var(--grid)",
        "linecolor": "var(--grid)",
        "zeroline": False,
        "automargin": True,
        "exponentformat": "B",
    }
    y_type: Json = {"type": "linear"}
    if log_of:
        positive = [value for value in log_of if value > 0.0] or [1.0]
        decades = math.log10(max(positive) / min(positive))
        y_type = {"type": "log", "exponentformat": "power"} | ({"dtick": math.ceil(decades / 6)} if decades > 2 else {})
    return {
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--muted)"},
        "paper_bgcolor": "var(--panel)",
        "plot_bgcolor": "var(--panel)",
        "margin": {"l": 56, "r": 12, "t": 8, "b": 44},
        "hoverlabel": {"bgcolor": "var(--page)", "bordercolor": "var(--grid)", "font": {"color": "var(--ink)"}},
        "hovermode": "closest",
        "showlegend": False,
        "xaxis": axis | {"title": {"text": x_title}},
        "yaxis": axis | {"title": {"text": y_title}} | y_type,
    }


def short(value: float) -> float:
    """Return six significant digits: more than a screen shows, and a third of the file."""
    return value if isinstance(value, int) else float(f"{value:.6g}")
