"""The report's panels as Plotly figures: plain dictionaries, drawn in the browser by `assets/report.js`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from monitoring.runlog import Record
from monitoring.runview import Evaluation, Recurrence, RunView, depth, depth_counts, number
from monitoring.traces import (
    Json,
    Points,
    base_trace,
    depth_scale,
    dot_trace,
    line_trace,
    panel_layout,
    run_colour,
    short,
)

# Points per series; and of all runs together, which bounds the size of the file and the time to draw it.
_SERIES_POINTS = 4000
_PAGE_POINTS = 16_000
_EARLIER_EVALUATIONS = 3
# Superseded steps are rings, because a replayed step lies exactly below the step that replaced it.
_RING = {"color": "var(--abandoned)", "size": 9, "symbol": "circle-open", "line": {"width": 1.5}}


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
    """

    key: str
    title: str
    caption: str
    traces: list[Json]
    layout: Json
    gap: str
    width: str = "half"


def panels(runs: Sequence[RunView]) -> list[Panel]:
    """Return every panel of the report, in page order; a panel without data says what is missing."""
    return [
        _loss_panel(runs),
        _depth_panel(runs),
        _histogram_panel(runs),
        _iterations_panel(
            runs,
            "state-rms",
            "State norm by iteration",
            "Root mean square of the recurrent state after each iteration of the core, newest measurement.",
            "state RMS",
            lambda state: state.state_rms,
        ),
        _iterations_panel(
            runs,
            "residual",
            "Relative residual by iteration",
            "Mean |s<sub>i</sub> - s<sub>i-1</sub>| / |s<sub>i</sub>|: a straight fall means that the recurrence"
            " contracts; a level line means that it does not converge.",
            "relative residual",
            lambda state: state.relative_residual,
            log=True,
        ),
        _steps_panel(runs, "grad-norm", "Gradient norm", "grad_norm", "global L2 norm"),
        _steps_panel(runs, "throughput", "Throughput", "tokens_per_second", "tokens/s"),
        _steps_panel(runs, "learning-rate", "Learning rate", "lr", "learning rate", raw_only=True),
    ]


def _loss_panel(runs: Sequence[RunView]) -> Panel:
    traces: list[Json] = []
    drawn: list[float] = []
    alone = len(runs) == 1
    limit = _limit(runs)
    for index, run in enumerate(runs):
        points = _loss_points(run.current)
        lost = _loss_points(run.abandoned)
        # As dense as the steps that are dots, or the rings would fill their stretch of the axis.
        lost = lost.thinned(max(limit * len(lost.x) // max(len(points.x), 1), 60))
        dots = points.thinned(limit)
        drawn += dots.y
        span = _span(len(points.x))
        traces.append(dot_trace(index, run, lost, "abandoned", _RING))
        size = 6 if len(dots.x) < 500 else 4
        marker: Json = {"color": run_colour(index), "size": size, "opacity": 0.45}
        if alone and dots.about and all(about[1] for about in dots.about):
            marker = {"size": size, "opacity": 0.9} | depth_scale([about[1] or 1 for about in dots.about])
        traces.append(dot_trace(index, run, dots, "step", marker))
        line = line_trace(index, run, points.smoothed(span).thinned(limit), f"mean of ~{span} steps")
        line["line"] = {"color": "var(--ink)" if alone else run_colour(index), "width": 2}
        traces.append(line)
        traces.append(_broken_steps(index, run, max(dots.y, default=0.0)))
    layout = panel_layout("tokens", "loss (nats)", log_of=drawn if _spans_decades(drawn) else ())
    if alone:
        layout |= _attempt_marks(runs[0])
    return Panel(
        "loss",
        "Loss against tokens",
        ("A dot is one step, coloured by its drawn depth r" if alone else "A dot is one step")
        + "; the line is the mean of neighbouring steps. Grey rings were replayed or abandoned after a restart"
        + ("; dotted verticals are where an attempt took over." if alone else ". Point at a dot for its depth."),
        _nonempty(traces),
        layout,
        "No training step logged yet.",
        width="wide",
    )


def _loss_points(records: Sequence[Record]) -> Points:
    points = Points()
    for record in sorted(records, key=lambda record: number(record, "tokens") or 0.0):
        tokens, loss = number(record, "tokens"), number(record, "loss")
        if tokens is not None and loss is not None:
            points.add(tokens, loss, [record["step"], depth(record), record["attempt"]])
    return points


def _broken_steps(index: int, run: RunView, height: float) -> Json:
    """Steps whose loss is not a number, marked along the top: they must not vanish from the plot."""
    points = Points()
    for record in run.current:
        tokens = number(record, "tokens")
        if tokens is not None and "loss" in record and number(record, "loss") is None:
            points.add(tokens, height, [record["step"], depth(record), record["attempt"]])
    trace = dot_trace(index, run, points.thinned(_SERIES_POINTS), "not finite", {"color": "var(--bad)", "size": 8})
    trace["marker"]["symbol"] = "x"
    trace["hovertemplate"] = "%{meta}<br>step %{customdata[0]}: loss is not finite<extra></extra>"
    return trace


def _attempt_marks(run: RunView) -> Json:
    """Dotted verticals where a later attempt took over, with its number."""
    starts: dict[int, float] = {}
    for record in run.current:
        tokens = number(record, "tokens")
        if tokens is not None:
            starts.setdefault(record["attempt"], tokens)
    later = list(starts.items())[1:]
    style = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    return {
        "shapes": [
            {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": style} for _, x in later
        ],
        "annotations": [
            {"x": x, "yref": "paper", "y": 1, "xanchor": "left", "yanchor": "top", "showarrow": False}
            | {"text": f"attempt {attempt}", "font": {"size": 11, "color": "var(--muted)"}}
            for attempt, x in later
        ],
    }


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
        depths.update(*(evaluation.loss for evaluation in scored))
    layout = panel_layout("depth r (core iterations)", "validation loss (nats)")
    layout["xaxis"] |= {"type": "log", "tickvals": sorted(depths), "ticktext": [str(r) for r in sorted(depths)]}
    return Panel(
        "loss-depth",
        "Loss against depth",
        "Newest evaluation"
        + ("; the ones before it fade" if len(runs) == 1 else " of every run")
        + ". Dotted: mean depth of training.",
        _nonempty(traces),
        layout,
        "No evaluation yet.",
    )


def _evaluation_line(index: int, run: RunView, evaluation: Evaluation) -> Json:
    points = Points()
    for r, loss in evaluation.loss.items():
        points.add(r, loss, [evaluation.step])
    trace = line_trace(index, run, points, "evaluation") | {"mode": "lines+markers", "marker": {"size": 6}}
    trace["hovertemplate"] = "%{meta}, step %{customdata[0]:,}<br>r = %{x}: loss %{y:.4f}<extra></extra>"
    return trace


def _mean_depth(index: int, run: RunView, evaluation: Evaluation) -> list[Json]:
    mean, losses = evaluation.mean_recurrence, evaluation.loss.values()
    if mean is None:
        return []
    rule = line_trace(index, run, Points([mean, mean], [min(losses), max(losses)], [[], []]), "mean depth")
    rule["line"] = {"color": run_colour(index), "width": 1, "dash": "dot"}
    rule["hovertemplate"] = "%{meta}<br>mean depth of training %{x:.4g}<extra></extra>"
    return [rule]


def _histogram_panel(runs: Sequence[RunView]) -> Panel:
    traces = []
    for index, run in enumerate(runs):
        counts: Counter[int] = Counter()
        for record in run.current:
            counts.update(depth_counts(record))
        drawn = sorted(counts)
        total = counts.total() or 1
        colour = run_colour(index)
        kind: Json = {"type": "bar", "marker": {"color": colour, "opacity": 0.7}}
        if len(runs) > 1:  # bars would hide each other
            kind = {"type": "scatter", "mode": "lines", "line": {"color": colour, "shape": "hvh", "width": 1.5}}
        trace = base_trace(index, run, "drawn depth", kind)
        trace |= {"x": drawn, "y": [short(100 * counts[r] / total) for r in drawn]}
        trace |= {"customdata": [[counts[r]] for r in drawn]}
        trace["hovertemplate"] = "%{meta}<br>r = %{x}: %{customdata[0]:,} times (%{y:.1f} %)<extra></extra>"
        traces.append(trace)
    layout = panel_layout("drawn depth r = n + k", "share of draws (%)")
    return Panel(
        "depth-histogram",
        "Drawn depth",
        "How often each depth was drawn; a step's time and loss depend on it.",
        _nonempty(traces),
        layout | {"bargap": 0.1},
        "No drawn depth logged yet.",
    )


def _iterations_panel(
    runs: Sequence[RunView],
    key: str,
    title: str,
    caption: str,
    quantity: str,
    values_of: Callable[[Recurrence], list[float | None]],
    log: bool = False,
) -> Panel:
    traces = []
    drawn: list[float] = []
    for index, run in enumerate(runs):
        state = run.recurrence
        if state is None:
            continue
        points = Points()
        for iteration, value in enumerate(values_of(state), start=1):
            if value is not None:
                points.add(iteration, value, [state.step])
        drawn += points.y
        trace = line_trace(index, run, points, quantity) | {"mode": "lines+markers", "marker": {"size": 5}}
        trace["hovertemplate"] = (
            f"%{{meta}}, step %{{customdata[0]:,}} ({state.source})<br>iteration %{{x}}: %{{y:.4g}}<extra></extra>"
        )
        traces.append(trace)
    layout = panel_layout("iteration i", quantity, log_of=drawn if log or _spans_decades(drawn) else ())
    if layout["yaxis"]["type"] == "linear":
        layout["yaxis"]["rangemode"] = "tozero"
    gap = "No probe or evaluation with the recurrent state yet."
    return Panel(key, title, caption, _nonempty(traces), layout, gap)


def _steps_panel(
    runs: Sequence[RunView], key: str, title: str, name: str, quantity: str, raw_only: bool = False
) -> Panel:
    traces = []
    drawn: list[float] = []
    limit = _limit(runs)
    for index, run in enumerate(runs):
        points = Points()
        for record in run.current:
            value = number(record, name)
            if value is not None:
                points.add(record["step"], value, [depth(record)])
        raw = points.thinned(limit)
        drawn += raw.y
        trace = line_trace(index, run, raw, quantity)
        trace["line"] = {"color": run_colour(index), "width": 1.8 if raw_only else 1}
        trace["hovertemplate"] = "%{meta}, step %{x:,}<br>%{y:.4g} at r = %{customdata[0]}<extra></extra>"
        traces.append(trace)
        if not raw_only:
            trace["opacity"] = 0.35 if len(runs) == 1 else 0.15
            span = _span(len(points.x))
            line = line_trace(index, run, points.smoothed(span).thinned(limit), f"mean of ~{span} steps")
            traces.append(line | {"line": {"color": run_colour(index), "width": 2}})
    caption = "As scheduled." if raw_only else "Faint: every step, which depends on the drawn depth. Bold: mean."
    layout = panel_layout("step", quantity, log_of=drawn if not raw_only and _spans_decades(drawn) else ())
    if raw_only:
        layout["yaxis"]["exponentformat"] = "e"  # 4e-5 and not 40 millionths
    return Panel(key, title, caption, _nonempty(traces), layout, f"No {title.lower()} logged yet.", width="third")


def _nonempty(traces: Sequence[Json]) -> list[Json]:
    return [trace for trace in traces if trace["x"]]


def _limit(runs: Sequence[RunView]) -> int:
    return min(_SERIES_POINTS, max(_PAGE_POINTS // max(len(runs), 1), 200))


def _span(count: int) -> int:
    """Smoothing window in steps: enough to see the trend at any length of the run."""
    return min(max(count // 50, 6), 500)


def _spans_decades(values: Sequence[float]) -> bool:
    """Whether a linear axis would squash the curve: an explosion runs over many powers of ten."""
    return bool(values) and min(values) > 0.0 and max(values) > 30.0 * min(values)
