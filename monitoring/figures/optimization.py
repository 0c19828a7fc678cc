"""The update: its gradient, its rate, and what it does to the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from monitoring.figures.panel import OPTIMIZATION, Curve, Panel, frame, points_for, step_points, steps_panel
from monitoring.reading.probe_fields import PARTS
from monitoring.reading.runview import RunView
from monitoring.traces import Json, Points, legend_above, line_trace, panel_layout, run_colour

_MOST_SKIPS = 500
_WEIGHTS = {"core": "core", "embedding": "embedding", "model": "others"}


def optimization_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Return gradient norm, learning rate, gradient shares, optimizer RMS, update ratio and weight norms."""
    rate = steps_panel(
        runs,
        frame("learning-rate", "Learning rate", "As scheduled.", "No learning rate logged yet.", OPTIMIZATION),
        "learning rate",
        [Curve("lr", "learning rate")],
        linear=True,
    )
    rate.layout["yaxis"]["exponentformat"] = "e"  # 4e-5 and not 40 millionths
    return [
        _gradient_panel(runs),
        _shares_panel(runs),
        rate,
        steps_panel(
            runs,
            frame(
                "optimizer-rms",
                "Optimizer RMS",
                "sqrt(mean g<sup>2</sup>/v): the largest of all tensors, and the median. Far above 1, it comes before a"
                " spike of the loss.",
                "No optimizer RMS measured yet.",
                OPTIMIZATION,
            ),
            "RMS",
            [Curve("optimizer_rms.max", "largest"), Curve("optimizer_rms.median", "median")],
        ),
        steps_panel(
            runs,
            frame(
                "update-ratio",
                "Update to weight",
                "RMS of the update over RMS of the weight: the largest of all tensors, and the median.",
                "No update ratio measured yet.",
                OPTIMIZATION,
            ),
            "ratio",
            [Curve("update_ratio.max", "largest"), Curve("update_ratio.median", "median")],
        ),
        steps_panel(
            runs,
            frame(
                "weight-norm",
                "Weight norm",
                "Length of the weights of the core, of the embedding, and of all other parts.",
                "No weight norm measured yet.",
                OPTIMIZATION,
            ),
            "L2 norm",
            [Curve(f"weight_norm.{part}", word) for part, word in _WEIGHTS.items()],
        ),
    ]


def _gradient_panel(runs: Sequence[RunView]) -> Panel:
    """The gradient norm, with a cross on every step whose update was vetoed."""
    panel = steps_panel(
        runs,
        frame(
            "grad-norm",
            "Gradient norm",
            "Faint: every step, which depends on the drawn depth. Bold: mean. Crosses: the update was skipped.",
            "No gradient norm logged yet.",
            OPTIMIZATION,
            width="half",
        ),
        "global L2 norm",
        [Curve("grad_norm", "gradient norm", smooth=True)],
    )
    return replace(panel, traces=panel.traces + [trace for i, run in enumerate(runs) if (trace := _skips(i, run))["x"]])


def _skips(index: int, run: RunView) -> Json:
    rows = run.rows()
    rows = rows[run.table.column("skipped")[rows]][-_MOST_SKIPS:]
    points = Points.of(*(run.table.column(name)[rows] for name in ("step", "grad_norm", "r")))
    trace = line_trace(index, run, points, "skipped") | {"mode": "markers"}
    trace["marker"] = {"color": "var(--bad)", "symbol": "x", "size": 7}
    trace["hovertemplate"] = "%{meta}, step %{x:,}<br>update skipped, gradient norm %{y:.4g}<extra></extra>"
    return trace


def _shares_panel(runs: Sequence[RunView]) -> Panel:
    """What part of the model the gradient falls on: stacked for one run, the core's alone for several."""
    traces: list[Json] = []
    limit = points_for(runs, 600)
    for index, run in enumerate(runs):
        for place, part in enumerate(PARTS if len(runs) == 1 else ("core",)):
            points = step_points(run, f"gradient_share.{part}")
            stride = max(len(points) // limit, 1)  # the same steps of every part, or they would not stack
            points = Points(points.x[::stride], points.y[::stride], points.about[::stride])
            trace = line_trace(index, run, points, part) | {"showlegend": len(runs) == 1}
            trace["hovertemplate"] = f"%{{meta}}, step %{{x:,}}<br>{part} %{{y:.3f}}<extra></extra>"
            if len(runs) == 1:
                colour = run_colour(place)
                trace |= {"stackgroup": "share", "line": {"color": colour, "width": 0.5}, "fillcolor": colour}
            traces.append(trace)
    layout = panel_layout("step", "share of squared norm")
    layout["yaxis"] |= {"rangemode": "tozero"} | ({"range": [0, 1]} if len(runs) == 1 else {})
    return Panel(
        "gradient-share",
        "Gradient by part" if len(runs) == 1 else "Gradient of the core",
        "Share of the squared gradient norm. A core that gets next to nothing has stopped learning.",
        [trace for trace in traces if trace["x"]],
        layout | (legend_above() if len(runs) == 1 else {}),
        "No gradient shares measured yet.",
        "half",
        OPTIMIZATION,
        "step",
    )
