"""From columns of numbers to Plotly traces, and the look that all panels share.

A colour is the name of a style-sheet variable, `var(--name)`: the page resolves it, so that one report serves light
and dark. Text of a run reaches a figure only escaped, because Plotly reads some HTML in labels.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from monitoring.reading.columns import Array
from monitoring.reading.runview import RunView
from monitoring.reading.series import Floats, smooth, thin

Json = dict[str, Any]

RUN_COLOURS = 8
"""Runs, or lines of one run, that the style sheet tells apart; further ones start over."""


@dataclass(frozen=True)
class Points:
    """Points of one series, x ascending, y finite, each with the integers that its hover label shows.

    Attributes:
        x: positions.
        y: values, same length.
        about: one row of integers a point.
    """

    x: Array
    y: Floats
    about: NDArray[np.int64]

    @classmethod
    def of(cls, x: ArrayLike, y: ArrayLike, *about: ArrayLike) -> Points:
        """Return the points of which position and value are finite."""
        x, y = np.asarray(x), np.asarray(y, dtype=np.float64)
        extra = (
            np.stack([np.asarray(part, dtype=np.int64) for part in about], axis=1) if about else np.empty((len(x), 0))
        )
        there = np.isfinite(x) & np.isfinite(y)
        return cls(x[there], y[there], extra[there].astype(np.int64))

    def __len__(self) -> int:
        return len(self.x)

    def thinned(self, limit: int) -> Points:
        """Return at most `limit` of the points, spikes among them."""
        kept = thin(self.x, self.y, limit)
        return Points(self.x[kept], self.y[kept], self.about[kept])

    def smoothed(self, span: float) -> Points:
        """Return the points with y averaged over about `span` neighbours."""
        return Points(self.x, smooth(self.y, span), self.about) if len(self) else self


def run_colour(index: int) -> str:
    """Return the colour of the run with this place on the page."""
    return f"var(--run-{index % RUN_COLOURS})"


def base_trace(index: int, run: RunView, name: str, kind: Json) -> Json:
    """Return what every trace of a run has: its name for the hover label, and the key by which the run is hidden."""
    return {"name": name, "meta": html.escape(run.name), "run": f"run-{index}", "showlegend": False} | kind


def line_trace(index: int, run: RunView, points: Points, name: str) -> Json:
    """Return a line in the run's colour; what its points are about goes with it."""
    trace = base_trace(index, run, name, {"type": "scatter", "mode": "lines", "line": {"color": run_colour(index)}})
    trace |= {"x": shortened(points.x), "y": shortened(points.y)}
    if points.about.shape[1]:
        trace["customdata"] = points.about.tolist()
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


def depth_scale(depths: Array) -> Json:
    """Return marker colours by log2 of the depth, with a colour bar labelled in depths."""
    logs = np.log2(depths)
    low, high = float(logs.min()), float(logs.max())
    ticks = range(math.ceil(low), math.floor(high) + 1)
    return {
        "color": shortened(logs),
        "colorscale": colour_scale("depth"),
        "cmin": low,
        "cmax": high if high > low else low + 1.0,
        "colorbar": colour_bar("r") | {"tickvals": list(ticks), "ticktext": [str(2**tick) for tick in ticks]},
    }


def colour_scale(name: str) -> list[list[Any]]:
    """Return the scale "depth" of dots or "heat" of heat maps, from low to high."""
    return [[i / 3, f"var(--{name}-{i})"] for i in range(4)]


def colour_bar(title: str) -> Json:
    """Return a slim colour bar."""
    return {"title": {"text": title}, "thickness": 8, "outlinewidth": 0, "len": 0.9, "xpad": 6}


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
    if len(log_of):
        values = np.asarray(log_of, dtype=np.float64)
        positive = values[values > 0.0] if (values > 0.0).any() else np.ones(1)
        decades = math.log10(positive.max() / positive.min())
        y_type = {"type": "log", "exponentformat": "power"} | {"dtick": math.ceil(decades / 6) if decades > 2 else "D2"}
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


def legend_above() -> Json:
    """Return the layout of a panel whose lines have names."""
    place = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal", "font": {"size": 11}}
    return {"showlegend": True, "legend": place, "margin": {"l": 56, "r": 12, "t": 30, "b": 44}}


def spans_decades(values: Sequence[float]) -> bool:
    """Whether a linear axis would squash the curve: an explosion runs over many powers of ten."""
    return len(values) > 0 and min(values) > 0.0 and max(values) > 30.0 * min(values)


def short(value: float) -> float:
    """Return six significant digits: more than a screen shows, and a third of the file."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def shortened(values: ArrayLike) -> list[Any]:
    """Return numbers with six significant digits; whole numbers as they are, None for what is not finite."""
    given = np.asarray(values)
    if given.dtype.kind in "iub":
        return list(given.tolist())
    numbers = given.astype(np.float64)
    there = np.isfinite(numbers)
    size = np.abs(np.where(there & (numbers != 0.0), numbers, 1.0))
    digits = 5 - np.floor(np.log10(size)).astype(np.int64)
    up, down = 10.0 ** np.clip(digits, 0, 300), 10.0 ** np.clip(-digits, 0, 308)  # exact powers for usual sizes
    rounded = np.round(np.where(there, numbers, 0.0) * up / down) / up * down
    if not there.all():
        rounded = rounded.astype(object)
        rounded[~there] = None
    return list(rounded.tolist())
