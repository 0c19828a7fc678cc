"""Where the time goes, and which part of the machine takes it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np

from monitoring.figures.panel import TIME, Curve, Panel, frame, heat_map, nonempty, steps_panel
from monitoring.goodput import PARTS
from monitoring.reading.runview import RunView, number
from monitoring.traces import Json, Points, base_trace, legend_above, line_trace, panel_layout, run_colour, shortened

_MOST_NODES = 40


def machine_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Return goodput, throughput, step times of nodes and checkpoints."""
    return [
        _goodput_panel(runs),
        _phases_panel(runs),
        steps_panel(
            runs,
            frame(
                "throughput",
                "Throughput",
                "Faint: every step, which depends on the drawn depth. Bold: mean.",
                "No throughput logged yet.",
                TIME,
            ),
            "tokens/s",
            [Curve("tokens_per_second", "tokens/s", smooth=True)],
        ),
        steps_panel(
            runs,
            frame(
                "pace",
                "Step time over expectation",
                "Seconds of a step over what its depth and batch should cost. A step up means that something slows it.",
                "No expected step time logged yet.",
                TIME,
            ),
            "ratio",
            [Curve("pace", "over expectation", smooth=True)],
        ),
        _checkpoints_panel(runs),
        *([] if len(runs) > 1 else [_nodes_panel(runs[0])]),
    ]


def _goodput_panel(runs: Sequence[RunView]) -> Panel:
    """Bars of allocated time by what it was spent on."""
    ledgers = [{} if run.ledger is None else {p: getattr(run.ledger, p) for p in PARTS} for run in runs]
    return _bars_panel(
        runs,
        "goodput",
        "Goodput",
        "What the time of all jobs was spent on; productive are steps that the run stands on.",
        ledgers,
        PARTS,
        "No time accounted for yet.",
    )


def _phases_panel(runs: Sequence[RunView]) -> Panel:
    totals = [dict(run.table.phases) for run in runs]
    names = sorted({name for total in totals for name in total}, key=lambda n: -sum(t.get(n, 0.0) for t in totals))
    return _bars_panel(
        runs,
        "phases",
        "Time within steps",
        "What the seconds of steps were spent on, replayed ones too.",
        totals,
        {name: name.replace("_", " ")[:40] for name in names},
        "No phases of steps logged yet.",
    )


def _bars_panel(
    runs: Sequence[RunView],
    key: str,
    title: str,
    caption: str,
    totals: Sequence[Mapping[str, float]],
    words: Mapping[str, str],
    gap: str,
) -> Panel:
    """Return one bar a run, cut into parts; what is not there takes no place."""
    traces: list[Json] = []
    for index, (run, total) in enumerate(zip(runs, totals, strict=True)):
        whole = sum(total.values())
        for place, (part, word) in enumerate(words.items()):
            if whole <= 0.0 or total.get(part, 0.0) <= 0.0:
                continue
            trace = base_trace(
                index, run, html.escape(word), {"type": "bar", "orientation": "h", "showlegend": index == 0}
            )
            trace |= {"x": shortened([100.0 * total[part] / whole]), "y": [html.escape(run.name[:40])]}
            trace |= {"marker": {"color": f"var(--part-{place % 8})"}, "customdata": [_duration(total[part])]}
            trace["hovertemplate"] = "%{meta}<br>%{fullData.name}: %{x:.2f} %, %{customdata}<extra></extra>"
            traces.append(trace)
    layout = panel_layout("share of the time (%)", "") | legend_above() | {"barmode": "stack", "bargap": 0.4}
    layout["xaxis"]["range"] = [0, 100]
    layout["yaxis"] |= {"type": "category", "showticklabels": len(runs) > 1, "title": {"text": ""}}
    return Panel(key, title, caption, traces, layout, gap, "half", TIME)


def _checkpoints_panel(runs: Sequence[RunView]) -> Panel:
    """Seconds of every checkpoint, and crosses where none came about."""
    traces = []
    for index, run in enumerate(runs):
        saved = [event for event in run.events if event["kind"] == "checkpoint"]
        tiers = sorted({str(event.get("tier", "")) for event in saved})[:4]
        for place, tier in enumerate(tiers):
            of_tier = [event for event in saved if str(event.get("tier", "")) == tier]
            steps = [number(event, "step") for event in of_tier]
            points = Points.of(_floats(steps), _floats([number(event, "seconds") for event in of_tier]))
            order = np.argsort(points.x, kind="stable")
            points = Points(points.x[order], points.y[order], points.about[order]).thinned(1200)
            trace = line_trace(index, run, points, html.escape(tier) or "checkpoint")
            trace |= {"mode": "markers", "showlegend": len(tiers) > 1 and index == 0}
            trace["marker"] = {"color": run_colour(place if len(runs) == 1 else index), "size": 5}
            trace["hovertemplate"] = "%{meta}<br>checkpoint at step %{x:,}: %{y:.3g} s<extra></extra>"
            traces.append(trace)
        lost = [number(e, "step") for e in run.events if e["kind"] in ("checkpoint_failed", "checkpoint_skipped")]
        points = Points.of(_floats(lost), np.zeros(len(lost)))
        trace = line_trace(index, run, points, "failed or passed over") | {"mode": "markers"}
        trace["marker"] = {"color": "var(--bad)", "symbol": "x", "size": 7}
        trace["hovertemplate"] = "%{meta}<br>checkpoint at step %{x:,} failed or was passed over<extra></extra>"
        traces.append(trace)
    layout = panel_layout("step", "seconds")
    layout["yaxis"]["rangemode"] = "tozero"
    return Panel(
        "checkpoints",
        "Checkpoints",
        "Seconds from begin to durable. Crosses: failed, or passed over because the one before was not done.",
        nonempty(traces),
        layout | (legend_above() if any(trace["showlegend"] for trace in traces) else {}),
        "No checkpoint yet.",
        "third",
        TIME,
    )


def _nodes_panel(run: RunView) -> Panel:
    """Every node's time over what is usual; of many nodes those that were slowest for longest."""
    traces = []
    samples = run.samples("nodes")
    hosts = sorted({host for _, node in samples for host in node})
    shown = hosts
    if len(hosts) > 1:
        columns = np.full((len(samples), len(hosts)), np.nan)
        place = {host: i for i, host in enumerate(hosts)}
        for column, (_, node) in zip(columns, samples, strict=True):
            column[[place[host] for host in node]] = list(node.values())
        if len(hosts) > _MOST_NODES:
            slowness = np.nanquantile(columns, 0.9, axis=0)
            slowest = np.sort(np.argsort(slowness)[-_MOST_NODES:])
            columns, shown = columns[:, slowest], [hosts[i] for i in slowest]
        trace = heat_map(0, run, [step for step, _ in samples], columns, [html.escape(h[:60]) for h in shown], "ratio")
        high = max(float(np.nanmax(columns, initial=1.3)), 1.3)
        trace |= {"zmin": 0.95, "zmax": min(high, 3.0)}
        trace["hovertemplate"] = "%{y}, step %{x:,}<br>%{z:.3f} times the usual<extra></extra>"
        traces = [trace]
    few = f" The {len(shown)} slowest of {len(hosts):,} nodes." if len(shown) < len(hosts) else ""
    layout = panel_layout("step", "")
    layout["yaxis"] |= {"type": "category", "title": {"text": ""}}
    caption = f"Seconds of computation before any communication, over what is usual.{few}"
    gap = "Step times of nodes are compared where there are several." if hosts else "No step times of nodes yet."
    return Panel("nodes", "Step time by node", caption, traces, layout, gap, "wide", TIME, "step")


def _duration(seconds: float) -> str:
    if seconds < 120.0:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200.0 else f"{seconds / 3600:.1f} h"


def _floats(values: Sequence[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]
