"""The training loss: every step with its depth, and what the depths do to it."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from monitoring.figures.panel import LOSS, Panel, nonempty, points_for, span_of
from monitoring.reading.columns import Array
from monitoring.reading.runview import RunView
from monitoring.reading.series import smooth
from monitoring.traces import (
    Json,
    Points,
    depth_scale,
    dot_trace,
    legend_above,
    line_trace,
    panel_layout,
    run_colour,
    spans_decades,
)

# Superseded steps are rings, because a replayed step lies exactly below the step that replaced it.
_RING = {"color": "var(--abandoned)", "size": 9, "symbol": "circle-open", "line": {"width": 1.5}}
_MOST_MARKS = 200
_ATTEMPTS_NAMED = 12


def loss_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Return the loss against tokens, and by depth."""
    return [_loss_panel(runs), _buckets_panel(runs) if len(runs) == 1 else _adjusted_panel(runs)]


def _loss_panel(runs: Sequence[RunView]) -> Panel:
    traces: list[Json] = []
    drawn: list[float] = []
    alone = len(runs) == 1
    limit = points_for(runs, 3000)
    for index, run in enumerate(runs):
        points, lost = _loss_points(run), _loss_points(run, abandoned=True)
        # As dense as the steps that are dots, or the rings would fill their stretch of the axis.
        lost = lost.thinned(max(limit * len(lost) // max(len(points), 1), 60))
        dots = points.thinned(limit)
        drawn += dots.y.tolist()
        span = span_of(len(points))
        ring = _RING if len(dots) < 500 else _RING | {"size": 5, "line": {"width": 1}}
        traces.append(dot_trace(index, run, lost, "abandoned", ring))
        size = 6 if len(dots) < 500 else 4
        marker: Json = {"color": run_colour(index), "size": size, "opacity": 0.45}
        if alone and len(dots) and dots.about[:, 1].all():
            marker = {"size": size, "opacity": 0.9 if len(dots) < 500 else 0.6} | depth_scale(dots.about[:, 1])
        traces.append(dot_trace(index, run, dots, "step", marker))
        line = line_trace(index, run, Points(points.x, points.y, points.about[:, :0]).smoothed(span).thinned(limit), "")
        line |= {
            "name": f"mean of ~{span} steps",
            "hovertemplate": "%{meta}<br>mean %{y:.4f} at %{x:.4~s}<extra></extra>",
        }
        line["line"] = {"color": "var(--ink)" if alone else run_colour(index), "width": 2}
        highest = float(dots.y.max(initial=0.0))
        traces += [line, _broken_steps(index, run, highest), _incidents(index, run, highest)]
    layout = panel_layout("tokens", "loss (nats)", log_of=drawn if spans_decades(drawn) else ())
    if alone:
        layout |= _attempt_marks(runs[0])
    return Panel(
        "loss",
        "Loss against tokens",
        ("A dot is one step, coloured by its drawn depth r" if alone else "A dot is one step")
        + "; the line is the mean of neighbouring steps. Grey rings were replayed or abandoned; triangles are incidents"
        + ("; dotted verticals are where an attempt took over." if alone else ". Point at a dot for its depth."),
        nonempty(traces),
        layout,
        "No training step logged yet.",
        "wide",
        LOSS,
        "tokens",
    )


def _loss_points(run: RunView, abandoned: bool = False) -> Points:
    rows = run.rows(abandoned)
    tokens, loss, *about = (run.table.column(name)[rows] for name in ("tokens", "loss", "step", "r", "attempt"))
    order = np.argsort(tokens, kind="stable")
    return Points.of(tokens[order], loss[order], *(column[order] for column in about))


def _broken_steps(index: int, run: RunView, height: float) -> Json:
    """Crosses, at the height of the highest loss, for steps whose loss is no finite number."""
    rows = run.rows()
    rows = rows[run.table.column("not_finite")[rows]][:_MOST_MARKS]
    tokens, *about = (run.table.column(name)[rows] for name in ("tokens", "step", "r", "attempt"))
    points = Points.of(tokens, np.full(len(rows), height), *about)
    trace = dot_trace(index, run, points, "not finite", {"color": "var(--bad)", "symbol": "x", "size": 9})
    trace["hovertemplate"] = "%{meta}, step %{customdata[0]:,}<br>loss is not finite<extra></extra>"
    return trace


def _incidents(index: int, run: RunView, height: float) -> Json:
    """Triangles, at the height of the highest loss, for incidents; those that led to nothing are hollow."""
    rows = run.rows()
    steps, tokens = run.table.column("step")[rows], run.table.column("tokens")[rows]
    there = np.isfinite(tokens)
    found = [
        (step, event)
        for _, event in run.incidents
        if isinstance(step := event.get("step", event.get("from_step")), int) and event["kind"] != "interval"
    ][-_MOST_MARKS:]
    if not there.any() or not found:
        return dot_trace(index, run, Points.of([], []), "incident", {})
    at = np.array([min(max(step, 0), 1 << 60) for step, _ in found])
    trace = line_trace(
        index, run, Points.of(np.interp(at, steps[there], tokens[there]), np.full(len(at), height), at), ""
    )
    hollow = [event["kind"] == "finding" and event.get("acted") is not True for _, event in found]
    marker = {"color": "var(--bad)", "size": 9, "symbol": [f"triangle-down{'-open' * empty}" for empty in hollow]}
    text = [html.escape(f"{event['kind']} {event.get('detector', '')}"[:80]) for _, event in found]
    trace |= {"name": "incident", "mode": "markers", "marker": marker, "text": text}
    trace["hovertemplate"] = "%{meta}, step %{customdata[0]:,}<br>%{text}<extra></extra>"
    return trace


def _attempt_marks(run: RunView) -> Json:
    """Dotted verticals where a later attempt took over, with its number if there are few."""
    rows = run.rows()
    tokens, attempt = run.table.column("tokens")[rows], run.table.column("attempt")[rows]
    tokens, attempt = tokens[np.isfinite(tokens)], attempt[np.isfinite(tokens)]
    starts = np.flatnonzero(np.diff(attempt, prepend=attempt[:1]))
    later = list(zip(attempt[starts].tolist(), tokens[starts].tolist(), strict=True))
    style = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    return {
        "shapes": [
            {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": style}
            for _, x in later[-_MOST_MARKS:]
        ],
        "annotations": [
            {"x": x, "yref": "paper", "y": 1, "xanchor": "left", "yanchor": "top", "showarrow": False}
            | {"text": f"attempt {number}", "font": {"size": 11, "color": "var(--muted)"}}
            for number, x in (later if len(later) <= _ATTEMPTS_NAMED else [])
        ],
    }


def _buckets_panel(runs: Sequence[RunView]) -> Panel:
    """The mean loss of steps of similar depth: a spike of one unlucky depth does not hide behind the others."""
    traces: list[Json] = []
    (run,) = runs
    points = _loss_points(run)
    bucket = _buckets(points.about[:, 1]) if len(points) else np.empty(0)
    enough = min(30, len(points) // 20)  # the mean of a few steps, far apart, is no curve
    found = [
        int(b) for b, count in zip(*np.unique(bucket, return_counts=True), strict=True) if b >= 0 and count >= enough
    ]
    for b in found if len(found) > 1 else []:
        these = Points(points.x[bucket == b], points.y[bucket == b], points.about[bucket == b][:, :1])
        line = line_trace(0, run, these.smoothed(span_of(len(these))).thinned(1200), _bucket_name(b))
        line["hovertemplate"] = f"r = {_bucket_name(b)}: mean %{{y:.4f}}<br>step %{{customdata[0]:,}}<extra></extra>"
        colour = f"var(--bucket-{min(b, 7)})"
        traces.append(
            line | {"line": {"color": colour, "width": 1.8}, "showlegend": True, "name": f"r {_bucket_name(b)}"}
        )
    return Panel(
        "loss-buckets",
        "Loss by drawn depth",
        "Mean of the steps of similar depth r; that of shallow steps lies above that of deep ones, once depth helps.",
        nonempty(traces),
        panel_layout("tokens", "loss (nats)", _log_of(traces)) | legend_above(),
        "No steps of several depths logged yet.",
        "half",
        LOSS,
        "tokens",
    )


def _adjusted_panel(runs: Sequence[RunView]) -> Panel:
    """Losses of several runs without what the luck of the depths does to them."""
    traces = []
    for index, run in enumerate(runs):
        points = _loss_points(run)
        if not len(points):
            continue
        span = span_of(len(points))
        residual = points.y - smooth(points.y, span)
        bucket = _buckets(points.about[:, 1])
        effect = np.zeros(len(points))
        for b in np.unique(bucket):
            effect[bucket == b] = np.median(residual[bucket == b])
        adjusted = Points(points.x, points.y - effect, points.about[:, :1]).smoothed(span)
        traces.append(line_trace(index, run, adjusted.thinned(points_for(runs, 1800)), "loss without depth"))
    return Panel(
        "loss-buckets",
        "Loss without the luck of depths",
        "Mean loss after taking off what the drawn depth of a step usually adds.",
        nonempty(traces),
        panel_layout("tokens", "loss (nats)", _log_of(traces)),
        "No steps logged yet.",
        "half",
        LOSS,
        "tokens",
    )


def _log_of(traces: Sequence[Json]) -> list[float]:
    drawn = [value for trace in traces for value in trace["y"]]
    return drawn if spans_decades(drawn) else []


def _buckets(depths: Array) -> Array:
    """Return floor(log2 r); -1 where no depth is known."""
    return np.where(depths > 0, np.floor(np.log2(np.maximum(depths, 1))), -1).astype(np.int64)


def _bucket_name(bucket: int) -> str:
    low, high = 2**bucket, 2 ** (bucket + 1) - 1
    return f"{low}" if low == high else f"{low} to {high}"
