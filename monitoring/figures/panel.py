"""What a panel of the page is, and the ways of drawing that panels share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from monitoring.reading.columns import Array
from monitoring.reading.runview import RunView
from monitoring.traces import (
    Json,
    Points,
    base_trace,
    colour_bar,
    colour_scale,
    legend_above,
    line_trace,
    panel_layout,
    run_colour,
    shortened,
    spans_decades,
)

# Points of all runs together, which bounds the size of the file and the time to draw it.
_PAGE_POINTS = 16_000
_ABANDONED_POINTS = 600
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_HEAT_COLUMNS = 240

LOSS = "Loss"
OPTIMIZATION = "Optimization"
RECURRENCE = "Recurrence"
TIME = "Time and machine"


@dataclass(frozen=True)
class Panel:
    """One plot of the page.

    Attributes:
        key: identifier in the page.
        title: heading.
        caption: how to read it.
        traces: Plotly traces; empty if there is nothing to draw.
        layout: Plotly layout.
        gap: what is missing, said in place of the plot.
        width: "wide", "half" or "third" of the page.
        group: heading above the panels that belong together; empty for none.
        axis: "step" or "tokens" where a part of the x axis can be asked for (`RunView.between`).
    """

    key: str
    title: str
    caption: str
    traces: list[Json]
    layout: Json
    gap: str
    width: str = "half"
    group: str = ""
    axis: str = ""


@dataclass(frozen=True)
class Curve:
    """A quantity over steps.

    Attributes:
        name: a column of the run table, or a probe that is one number.
        label: in words.
        smooth: whether it is drawn faint, under its mean.
    """

    name: str
    label: str
    smooth: bool = False


def frame(key: str, title: str, caption: str, gap: str, group: str, width: str = "third") -> Panel:
    """Return a panel over steps that nothing is drawn in yet."""
    return Panel(key, title, caption, [], {}, gap, width, group, "step")


def steps_panel(
    runs: Sequence[RunView],
    empty: Panel,
    quantity: str,
    curves: Sequence[Curve],
    *,
    from_zero: bool = False,
    linear: bool = False,
) -> Panel:
    """Return quantities over steps: of one run every curve in a colour, of several in a dash; abandoned steps in grey.

    Args:
        runs: what to draw.
        empty: the panel to draw it in.
        quantity: title of the y axis.
        curves: what to draw of every run.
        from_zero: whether a linear y axis begins at zero.
        linear: whether the y axis is linear even if the values span decades.
    """
    traces: list[Json] = []
    drawn: list[float] = []
    limit = points_for(runs, {"third": 1200, "half": 1800, "wide": 4000}[empty.width])
    for index, run in enumerate(runs):
        for place, curve in enumerate(curves):
            colour = run_colour(place if len(runs) == 1 else index)
            style: Json = {"color": colour, "width": 1.8, "dash": _DASHES[place % 6] if len(runs) > 1 else "solid"}
            lost = step_points(run, curve.name, abandoned=True)
            if len(lost):
                traces.append(_grey_dots(index, run, lost.thinned(_ABANDONED_POINTS), curve.label))
            points = step_points(run, curve.name)
            raw = points.thinned(limit)
            drawn += raw.y.tolist()
            named: Json = {"showlegend": len(curves) > 1 and index == 0}
            if curve.smooth and len(points) > 2:
                faint: Json = {"opacity": 0.35 if len(runs) == 1 else 0.15}
                traces.append(_step_line(index, run, raw, curve.label) | faint | {"line": style | {"width": 1}})
                span = span_of(len(points))
                raw = points.smoothed(span).thinned(limit)
                named["name"] = curve.label if len(curves) > 1 else f"mean of ~{span} steps"
            traces.append(_step_line(index, run, raw, curve.label) | {"line": style} | named)
            if len(raw) < 60:
                traces[-1] |= {"mode": "lines+markers", "marker": {"size": 4}}
    layout = panel_layout("step", quantity, log_of=drawn if not linear and spans_decades(drawn) else ())
    if from_zero and layout["yaxis"]["type"] == "linear":
        layout["yaxis"]["rangemode"] = "tozero"
    if len(curves) > 1:
        layout |= legend_above()
    return replace(empty, traces=nonempty(traces), layout=layout)


def step_points(run: RunView, name: str, abandoned: bool = False) -> Points:
    """Return a column or probe over steps; each point is about its drawn depth."""
    table = run.table
    if name in table.names:
        rows = run.rows(abandoned)
        values = table.column(name)[rows]
    else:
        rows, values = run.probe(name, abandoned)
    steps = table.column("step")[rows]
    order = np.argsort(steps, kind="stable") if abandoned else slice(None)
    return Points.of(steps[order], values[order], table.column("r")[rows][order])


def _step_line(index: int, run: RunView, points: Points, label: str) -> Json:
    trace = line_trace(index, run, points, label)
    trace["hovertemplate"] = f"%{{meta}}, step %{{x:,}}<br>{label} %{{y:.4g}} at r = %{{customdata[0]}}<extra></extra>"
    return trace


def _grey_dots(index: int, run: RunView, points: Points, label: str) -> Json:
    trace = _step_line(index, run, points, f"{label}, abandoned")
    return trace | {"name": "abandoned", "mode": "markers", "marker": {"color": "var(--abandoned)", "size": 3}}


def heat_map(
    index: int, run: RunView, steps: Sequence[int], columns: Array, rows: Sequence[object], title: str
) -> Json:
    """Return a heat map over steps, of log10 or plain numbers; neighbouring columns show their highest value.

    Args:
        index: place of the run on the page.
        run: whose.
        steps: of every column, ascending.
        columns: shape (steps, rows), nan for nothing.
        rows: what is written at the y axis; plain numbers or escaped text.
        title: of the colour bar.
    """
    starts = np.unique(np.linspace(0, len(steps), min(len(steps), _HEAT_COLUMNS), endpoint=False).astype(np.int64))
    highest = np.fmax.reduceat(columns, starts, axis=0)
    trace = base_trace(
        index, run, title, {"type": "heatmap", "colorscale": colour_scale("heat"), "colorbar": colour_bar(title)}
    )
    return trace | {
        "x": [steps[start] for start in starts],
        "y": list(rows),
        "z": [shortened(np.float16(row)) for row in highest.T],
        "hoverongaps": False,
    }


def points_for(runs: Sequence[RunView], alone: int) -> int:
    """Return the most points of a series where one run would get `alone`."""
    return min(alone, max(_PAGE_POINTS * alone // 4000 // max(len(runs), 1), 200))


def span_of(count: int) -> int:
    """Smoothing window in steps: enough to see the trend at any length of the run."""
    return min(max(count // 50, 6), 500)


def nonempty(traces: Sequence[Json]) -> list[Json]:
    """Return the traces that show something."""
    return [trace for trace in traces if trace["x"]]
