"""The forecast of a run's depths (`rookery depth`) as a page of its own."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monitoring.figures import Panel
from monitoring.page import render_page, table, write_page
from monitoring.reading.series import thin
from monitoring.traces import Json, panel_layout, short

_POINTS = 4000


def write_forecast_page(forecast: dict[str, Any], out: Path) -> None:
    """Write what `pipeline.forecast.forecast` returns to the self-contained HTML file `out`.

    Raises:
        RunLogError: the file cannot be written.
    """
    curve = forecast["curve"]
    panels = [
        _steps("flops", "FLOPs of a step", "As drawn.", curve, [("flops", "FLOPs")], "wide", dots=True),
        _histogram(forecast),
        _steps(
            "recurrence",
            "Mean recurrence and backprop depth",
            "As scheduled: the mean parameter of the draw, and the most iterations with gradient.",
            curve,
            [("mean_recurrence", "mean recurrence"), ("backprop_depth", "backprop depth")],
            "half",
        ),
        _steps("rate", "Learning rate", "As scheduled.", curve, [("learning_rate", "learning rate")], "half"),
        _steps("batch", "Batch size", "As scheduled.", curve, [("batch_size", "sequences")], "half"),
    ]
    page = render_page(
        panels,
        title=f"{forecast['name']} - Rookery",
        brand="Rookery depth forecast",
        heading=forecast["name"],
        as_of=f"the first {forecast['steps']:,} steps, {forecast['samples']:,} sequences",
        before=_summary(forecast),
        after="",
    )
    write_page(page, out, "page")


def _summary(forecast: dict[str, Any]) -> str:
    recurrence, flops = forecast["recurrence"], forecast["flops"]
    header = (
        "sampler",
        "scope",
        "mean depth",
        "expected",
        "range",
        "FLOPs a step",
        "FLOPs in all",
        "saved by curricula",
    )
    row = (
        html.escape(forecast["sampler"]),
        html.escape(forecast["scope"]),
        f"{recurrence['mean']:.2f}",
        f"{recurrence['expected']:.2f}",
        f"{recurrence['min']} to {recurrence['max']}",
        f"{flops['mean_step']:.3e}",
        f"{flops['total']:.3e}",
        f"{flops['saved']:.1%}",
    )
    return table(header, [row])


def _histogram(forecast: dict[str, Any]) -> Panel:
    counts = {int(r): count for r, count in forecast["histogram"].items()}
    total = sum(counts.values())
    trace: Json = {
        "type": "bar",
        "name": "drawn depth",
        "x": list(counts),
        "y": [short(100 * count / total) for count in counts.values()],
        "marker": {"color": "var(--run-0)", "opacity": 0.7},
        "hovertemplate": "r = %{x}: %{y:.2f} %<extra></extra>",
    }
    layout = panel_layout("drawn depth r = n + k", "share (%)") | {"bargap": 0.1}
    return Panel("histogram", "Drawn depth", "How often each depth will be drawn.", [trace], layout, "", "half")


def _steps(
    key: str,
    title: str,
    caption: str,
    curve: dict[str, list[float]],
    names: Sequence[tuple[str, str]],
    width: str,
    dots: bool = False,
) -> Panel:
    traces: list[Json] = []
    for index, (name, label) in enumerate(names):
        kept = thin(curve["step"], curve[name], _POINTS)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers" if dots else "lines",
                "name": label,
                "x": [curve["step"][i] for i in kept],
                "y": [short(curve[name][i]) for i in kept],
                "marker": {"color": f"var(--run-{index})", "size": 4, "opacity": 0.6},
                "line": {"color": f"var(--run-{index})", "width": 1.8},
                "hovertemplate": f"step %{{x:,}}: {label} %{{y:.4~s}}<extra></extra>",
            }
        )
    layout = panel_layout("step", names[0][1] if len(names) == 1 else "iterations")
    layout["yaxis"] |= {"rangemode": "tozero", "exponentformat": "e"}
    return Panel(key, title, caption, traces, layout, "", width)
