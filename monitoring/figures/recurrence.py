"""The recurrence itself: does its state keep its size, does it settle, do tokens stay apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from monitoring.figures.panel import RECURRENCE, Curve, Panel, frame, heat_map, nonempty, steps_panel
from monitoring.reading.columns import Array
from monitoring.reading.runview import Recurrence, RunView
from monitoring.traces import Points, line_trace, panel_layout, spans_decades

_GAP = "No recurrent state measured yet."
_MOST_ITERATIONS = 128
_REFERENCE = (
    "hidden_correlation",
    "hidden_norm",
    "state_norm",
    "state_minus_input",
    "state_change",
    "reference_residual",
)


def recurrence_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Return the state by iteration, over steps and newest, and the signs of its health."""
    heats = [] if len(runs) > 1 else _heat_panels(runs[0])
    return [
        *heats,
        *_health_panels(runs),
        _iterations_panel(
            runs,
            "state-rms",
            "State norm by iteration",
            "Root mean square of the state after each iteration of the core, newest measurement.",
            "state RMS",
            lambda state: state.state_rms,
        ),
        _iterations_panel(
            runs,
            "residual",
            "Residual by iteration",
            "Mean |s<sub>i</sub> - s<sub>i-1</sub>| / |s<sub>i</sub>|, newest: a straight fall means that the"
            " recurrence contracts; a level line means that it does not converge.",
            "relative residual",
            lambda state: state.relative_residual,
            log=True,
        ),
        steps_panel(
            runs,
            frame(
                "first-jump",
                "First iteration",
                "RMS of the prelude's output, and of the state after the first iteration over that before it:"
                " an explosion of the input shows here first.",
                "No first iteration measured yet.",
                RECURRENCE,
            ),
            "RMS, ratio",
            [Curve("injected_rms", "input RMS"), Curve("first_jump", "first jump")],
        ),
        steps_panel(
            runs,
            frame(
                "reference",
                "The reference's telemetry",
                "As the reference measures them, on what the head is given and on its last two states.",
                "No telemetry of the reference measured yet.",
                RECURRENCE,
            ),
            "norm, cosine, ratio",
            [Curve(name, name.replace("_", " ")) for name in _REFERENCE],
        ),
    ]


def _health_panels(runs: Sequence[RunView]) -> list[Panel]:
    return [
        steps_panel(
            runs,
            frame(
                "contraction",
                "Contraction",
                "By how much each iteration moves the state less than the one before. Above 1 the recurrence does not"
                " settle: a sign that comes before a collapse.",
                "No contraction measured yet.",
                RECURRENCE,
            ),
            "ratio",
            [Curve("contraction", "contraction")],
        ),
        steps_panel(
            runs,
            frame(
                "token-correlation",
                "Token correlation",
                "Mean cosine between the states of different tokens. At 1 all tokens are the same: collapse.",
                "No token correlation measured yet.",
                RECURRENCE,
            ),
            "correlation",
            [Curve("token_correlation", "correlation")],
        ),
        steps_panel(
            runs,
            frame(
                "effective-rank",
                "Effective rank",
                "Number of directions that the states of the tokens fill; 1 after a collapse.",
                "No effective rank measured yet.",
                RECURRENCE,
            ),
            "rank",
            [Curve("effective_rank", "effective rank")],
            from_zero=True,
        ),
    ]


def _heat_panels(run: RunView) -> list[Panel]:
    return [
        _heat_panel(
            run,
            "state-heat",
            "State norm over training",
            "Root mean square of the state (power of ten) by iteration and step. Strong at the top: it grows.",
            "state_rms",
        ),
        _heat_panel(
            run,
            "residual-heat",
            "Residual over training",
            "Relative residual (power of ten) by iteration and step. Strong at the top: it does not settle.",
            "relative_residual",
        ),
    ]


def _heat_panel(run: RunView, key: str, title: str, caption: str, name: str) -> Panel:
    traces = []
    if samples := run.samples(name):
        depth = min(max(len(values) for _, values in samples), _MOST_ITERATIONS)
        columns = np.full((len(samples), depth), np.nan)
        for column, (_, values) in zip(columns, samples, strict=True):
            column[: len(values)] = values[:depth]
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = np.log10(np.where(columns > 0.0, columns, np.nan))
        trace = heat_map(0, run, [step for step, _ in samples], columns, range(1, depth + 1), "log<sub>10</sub>")
        trace["hovertemplate"] = "step %{x:,}, iteration %{y}<br>10<sup>%{z:.2f}</sup><extra></extra>"
        if np.nanmax(columns, initial=-np.inf) - np.nanmin(columns, initial=np.inf) < 0.1:  # not a change to look at
            middle = float(np.nanmean(columns)) if np.isfinite(columns).any() else 0.0
            trace |= {"zmin": middle - 0.5, "zmax": middle + 0.5}
        traces = [trace]
    layout = panel_layout("step", "iteration i")
    return Panel(key, title, caption, traces, layout, _GAP, "half", RECURRENCE, "step")


def _iterations_panel(
    runs: Sequence[RunView],
    key: str,
    title: str,
    caption: str,
    quantity: str,
    values_of: Callable[[Recurrence], Array],
    log: bool = False,
) -> Panel:
    traces = []
    drawn: list[float] = []
    for index, run in enumerate(runs):
        state = run.recurrence
        if state is None:
            continue
        values = values_of(state)
        points = Points.of(np.arange(1, len(values) + 1), values, np.full(len(values), state.step))
        drawn += points.y.tolist()
        trace = line_trace(index, run, points, quantity) | {"mode": "lines+markers", "marker": {"size": 5}}
        trace["hovertemplate"] = (
            f"%{{meta}}, step %{{customdata[0]:,}} ({state.source})<br>iteration %{{x}}: %{{y:.4g}}<extra></extra>"
        )
        traces.append(trace)
    layout = panel_layout("iteration i", quantity, log_of=drawn if log or spans_decades(drawn) else ())
    if layout["yaxis"]["type"] == "linear":
        layout["yaxis"]["rangemode"] = "tozero"
    return Panel(key, title, caption, nonempty(traces), layout, _GAP, "third", RECURRENCE)
