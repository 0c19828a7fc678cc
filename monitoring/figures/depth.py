"""What depth is worth: validation at several depths, the gain of going deep, the depths that were drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from monitoring.figures.panel import LOSS, Curve, Panel, frame, nonempty, steps_panel
from monitoring.reading.runview import Evaluation, RunView
from monitoring.traces import (
    Json,
    Points,
    base_trace,
    legend_above,
    line_trace,
    panel_layout,
    run_colour,
    shortened,
    spans_decades,
)

_EARLIER_EVALUATIONS = 3
_DASHES = ("solid", "dash", "dot", "dashdot")


def depth_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Return validation by depth, now and over steps, the depth gain and the depths that were drawn."""
    return [
        _validation_panel(runs),
        _depth_panel(runs),
        steps_panel(
            runs,
            frame(
                "depth-gain",
                "Depth gain",
                "Loss of a fixed batch at depth 1 and at the mean depth. Equal lines: the recurrence is ignored.",
                "No depth gain measured yet.",
                LOSS,
            ),
            "loss (nats)",
            [Curve("depth_gain.shallow", "depth 1"), Curve("depth_gain.deep", "mean depth")],
        ),
        _histogram_panel(runs),
    ]


def _depth_panel(runs: Sequence[RunView]) -> Panel:
    traces: list[Json] = []
    depths: set[int] = set()
    for index, run in enumerate(runs):
        scored = [evaluation for evaluation in run.evaluations if evaluation.loss]
        if len(runs) == 1:
            for age, evaluation in enumerate(reversed(scored[-1 - _EARLIER_EVALUATIONS : -1]), start=1):
                traces.append(_evaluation_line(index, run, evaluation) | {"opacity": 0.55 / age})
        if scored:
            traces += [_evaluation_line(index, run, scored[-1]), *_mean_depth(index, run, scored[-1])]
            depths.update(*(evaluation.loss for evaluation in scored[-1 - _EARLIER_EVALUATIONS :]))
    layout = panel_layout("depth r (core iterations)", "validation loss (nats)")
    layout["xaxis"] |= {"type": "log", "tickvals": sorted(depths), "ticktext": [str(r) for r in sorted(depths)]}
    return Panel(
        "loss-depth",
        "Validation against depth",
        "Newest evaluation"
        + ("; the ones before it fade" if len(runs) == 1 else " of every run")
        + ". Dotted: mean depth of training.",
        nonempty(traces),
        layout,
        "No evaluation yet.",
        "third",
        LOSS,
    )


def _evaluation_line(index: int, run: RunView, evaluation: Evaluation) -> Json:
    points = Points.of(list(evaluation.loss), list(evaluation.loss.values()), [evaluation.step] * len(evaluation.loss))
    trace = line_trace(index, run, points, "evaluation") | {"mode": "lines+markers", "marker": {"size": 6}}
    trace["hovertemplate"] = "%{meta}, step %{customdata[0]:,}<br>r = %{x}: loss %{y:.4f}<extra></extra>"
    return trace


def _mean_depth(index: int, run: RunView, evaluation: Evaluation) -> list[Json]:
    mean, losses = evaluation.mean_recurrence, evaluation.loss.values()
    if mean is None:
        return []
    rule = line_trace(index, run, Points.of([mean, mean], [min(losses), max(losses)]), "mean depth")
    rule["line"] = {"color": run_colour(index), "width": 1, "dash": "dot"}
    rule["hovertemplate"] = "%{meta}<br>mean depth of training %{x:.4g}<extra></extra>"
    return [rule]


def _validation_panel(runs: Sequence[RunView]) -> Panel:
    """Validation losses over steps, a line a depth: in the colour of the depth, or of the run with a dash a depth."""
    traces: list[Json] = []
    depths = sorted({r for run in runs for evaluation in run.evaluations for r in evaluation.loss})
    shown = (
        depths
        if len(runs) == 1
        else [depths[i] for i in sorted({0, len(depths) // 2, len(depths) - 1})]
        if depths
        else []
    )
    for index, run in enumerate(runs):
        for place, r in enumerate(shown):
            scored = [evaluation for evaluation in run.evaluations if r in evaluation.loss]
            points = Points.of([e.step for e in scored], [e.loss[r] for e in scored])
            if run.window is not None and run.window[0] == "step":
                inside = (points.x >= run.window[1]) & (points.x <= run.window[2])
                points = Points(points.x[inside], points.y[inside], points.about[inside])
            trace = line_trace(index, run, points.thinned(1800), f"r = {r}") | {"showlegend": index == 0}
            colour = f"var(--bucket-{min(r.bit_length() - 1, 7)})" if len(runs) == 1 else run_colour(index)
            trace["line"] = {"color": colour, "width": 1.8, "dash": "solid" if len(runs) == 1 else _DASHES[place % 4]}
            trace["hovertemplate"] = f"%{{meta}}, step %{{x:,}}<br>r = {r}: %{{y:.4f}}<extra></extra>"
            traces.append(trace | {"mode": "lines+markers" if len(points) < 60 else "lines", "marker": {"size": 4}})
    drawn = [value for trace in traces for value in trace["y"]]
    return Panel(
        "validation",
        "Validation by depth",
        "Validation loss at each depth. Lines that fall together mean that depth is not used.",
        nonempty(traces),
        panel_layout("step", "validation loss (nats)", drawn if spans_decades(drawn) else ()) | legend_above(),
        "No validation yet.",
        "half",
        LOSS,
        "step",
    )


def _histogram_panel(runs: Sequence[RunView]) -> Panel:
    traces = []
    for index, run in enumerate(runs):
        drawn = np.flatnonzero(run.table.draws[1:]) + 1
        counts = run.table.draws[drawn]
        colour = run_colour(index)
        kind: Json = {"type": "bar", "marker": {"color": colour, "opacity": 0.7}}
        if len(runs) > 1:  # bars would hide each other
            kind = {"type": "scatter", "mode": "lines", "line": {"color": colour, "shape": "hvh", "width": 1.5}}
        trace = base_trace(index, run, "drawn depth", kind)
        trace |= {"x": drawn.tolist(), "y": shortened(100 * counts / max(counts.sum(), 1))}
        trace |= {"customdata": counts[:, None].tolist()}
        trace["hovertemplate"] = "%{meta}<br>r = %{x}: %{customdata[0]:,} times (%{y:.1f} %)<extra></extra>"
        traces.append(trace)
    return Panel(
        "depth-histogram",
        "Drawn depth",
        "How often each depth was drawn, in replayed steps too; a step's time and loss depend on it.",
        nonempty(traces),
        panel_layout("drawn depth r = n + k", "share of draws (%)") | {"bargap": 0.1},
        "No drawn depth logged yet.",
        "third",
        LOSS,
    )
