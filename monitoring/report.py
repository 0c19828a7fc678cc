"""One or several runs as a single HTML file that works from a disk, offline, for years."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from monitoring.figures import panels
from monitoring.incidents import crashes_html, incidents_html
from monitoring.page import render_page, table, write_page
from monitoring.reading.run_reader import read_runs
from monitoring.reading.runview import Attempt, RunView, number
from monitoring.runlog import Record, RunLogError
from monitoring.traces import RUN_COLOURS

_EVENTS_SHOWN = 200
_CONFIG_SHOWN = 50_000
_MOST_REASON = 160
_ABSENT = '<span class="absent">none yet</span>'
_NEVER = '<span class="absent">none</span>'


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write the report of the given run directories, overlaid for comparison, to the file `out`.

    What a run does not have yet is said in its place.

    Raises:
        RunLogError: no run, a missing run directory, one named twice, or a file that cannot be written.
    """
    if not runs:
        raise RunLogError("a report needs at least one run directory: name the directory that `rookery train` wrote")
    views = read_runs(runs)
    names = ", ".join(run.name for run in views)
    page = render_page(
        panels(views),
        title=f"{names} - Rookery",
        brand="Rookery run report",
        heading=names if len(views) == 1 else f"{len(views)} runs",
        as_of=_as_of(views),
        before=summary_html(views),
        after=details_html(views),
        chips=_chips(views),
    )
    write_page(page, out, "report")


def summary_html(runs: Sequence[RunView]) -> str:
    """Return a row a run of how it stands, and the warnings about what could not be read."""
    return f"{_runs_table(runs)}\n{_warnings(runs)}"


def details_html(runs: Sequence[RunView]) -> str:
    """Return what is no plot: incidents with their evidence, attempts, crash reports, events, configuration."""
    sections = {
        "Incidents": incidents_html(runs),
        "Attempts": _attempts_table(runs),
        "Crash reports": crashes_html(runs),
        "Events": _events_table(runs),
        "Configuration": _configs(runs),
    }
    return "\n".join(f"<section><h2>{title}</h2>\n{body}\n</section>" for title, body in sections.items())


def _as_of(runs: Sequence[RunView]) -> str:
    """Time of the newest step rather than of writing: the same runs give the same file."""
    times = [time for run in runs if (time := number(run.last, "time")) is not None]
    return f"as of {_time(max(times))}" if times else "no step yet"


def _time(seconds: float | None) -> str:
    try:
        return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, OSError, ValueError):
        return "impossible time"


def _runs_table(runs: Sequence[RunView]) -> str:
    header = (
        "run",
        "steps",
        "tokens",
        "last loss",
        "best validation loss",
        "unigram entropy",
        "attempts",
        "newest attempt",
    )
    return table(header, (_run_row(index, run) for index, run in enumerate(runs)), "runs")


def _run_row(index: int, run: RunView) -> list[str]:
    last = run.last
    tokens = number(last, "tokens")
    best, absent = run.best, _NEVER if _over(run) else _ABSENT
    entropies = (evaluation.unigram_entropy for evaluation in reversed(run.evaluations))
    entropy = next((value for value in entropies if value is not None), None)
    return [
        f'<i class="swatch run-{index % RUN_COLOURS}"></i><b>{html.escape(run.name)}</b>',
        f"{last['step']:,}" if last else _ABSENT,
        _ABSENT if tokens is None else f"{tokens:,.0f}",
        _loss(last),
        f"{best[0]:.4f} <small>at r = {best[1]}, step {best[2]:,}</small>" if best else absent,
        absent if entropy is None else f"{entropy:.4f}",
        str(len(run.attempts)) if run.attempts else _ABSENT,
        _ending(run.attempts[-1], _MOST_REASON) if run.attempts else _ABSENT,
    ]


def _loss(record: Record) -> str:
    if record.get("loss") in ("nan", "inf", "-inf"):  # as the run log spells them
        return f'<span class="bad">{record["loss"]}</span>'
    loss = number(record, "loss")
    return _ABSENT if loss is None else f"{loss:.4f}"


def _over(run: RunView) -> bool:
    """Whether nothing more comes of a run."""
    return bool(run.attempts) and run.attempts[-1].exit_code in (0, 11)


def _ending(attempt: Attempt, most: int = 2000) -> str:
    mood = {None: "", 0: "good", 10: "good"}.get(attempt.exit_code, "bad")
    text = attempt.ending if len(attempt.ending) <= most else f"{attempt.ending[: most - 3]}..."
    return f'<span class="{mood}">{html.escape(text)}</span>'


def _warnings(runs: Sequence[RunView]) -> str:
    items = "".join(f"<li>{html.escape(run.name)}: {html.escape(text)}</li>" for run in runs for text in run.warnings)
    return f'<ul class="warnings">{items}</ul>' if items else ""


def _chips(runs: Sequence[RunView]) -> str:
    """Buttons that hide and show a run in all panels; a single run needs none."""
    if len(runs) == 1:
        return ""
    return "".join(
        f'<button type="button" aria-pressed="true" data-run="run-{index}">'
        f'<i class="swatch run-{index % RUN_COLOURS}"></i>{html.escape(run.name)}</button>'
        for index, run in enumerate(runs)
    )


def _attempts_table(runs: Sequence[RunView]) -> str:
    rows = [
        [
            html.escape(run.name),
            str(attempt.number),
            f"{attempt.steps[0]:,} to {attempt.steps[1]:,}" if attempt.steps else "none logged",
            _ending(attempt),
        ]
        for run in runs
        for attempt in run.attempts
    ]
    if not rows:
        return '<p class="gap">No attempt yet.</p>'
    notes = [f"<p>{html.escape(run.name)}: {_replay(run)}</p>" for run in runs if len(run.rows(abandoned=True))]
    return table(("run", "attempt", "steps", "ended"), rows) + "".join(notes)


def _replay(run: RunView) -> str:
    superseded = f"{len(run.rows(abandoned=True)):,} step records superseded by a later attempt or a rollback"
    difference = run.replay_difference()
    if difference is None:
        return f"{superseded}, none of them replayed yet."
    exact = "bitwise equal losses" if difference[1] == 0.0 else f"largest loss difference {difference[1]:.3g} nats"
    return f"{superseded}, {difference[0]:,} of them replayed: {exact}."


def _events_table(runs: Sequence[RunView]) -> str:
    events = [(run.name, event) for run in runs for event in run.events]
    if not events:
        return '<p class="gap">No event yet.</p>'
    if len(runs) > 1:  # of one run, the order written is truer than a clock that may have been set
        events.sort(key=lambda item: number(item[1], "time") or 0.0)
    merged = _merged(events)
    hidden = sum(count for _, _, count in merged[:-_EVENTS_SHOWN])
    rows = [
        [
            _time(number(event, "time")),
            html.escape(name),
            html.escape(str(event.get("attempt", ""))),
            *_describe(event, count),
        ]
        for name, event, count in reversed(merged[-_EVENTS_SHOWN:])
    ]
    note = f"<p>{hidden:,} older events are in events.jsonl.</p>" if hidden else ""
    return table(("time", "run", "attempt", "event", "details"), rows, "events") + note


def _merged(events: Sequence[tuple[str, Record]]) -> list[tuple[str, Record, int]]:
    """Return the events, of neighbours that differ in time and step alone the last one, with their number."""
    merged: list[tuple[str, Record, int]] = []
    for name, event in events:
        count = 1
        if merged and merged[-1][0] == name and _same(merged[-1][1], event):
            count += merged.pop()[2]
        merged.append((name, event, count))
    return merged


def _same(one: Record, other: Record) -> bool:
    differ = ("time", "step")
    return {k: v for k, v in one.items() if k not in differ} == {k: v for k, v in other.items() if k not in differ}


def _describe(event: Record, count: int) -> list[str]:
    said = {
        key: value
        for key, value in event.items()
        if key not in {"time", "attempt", "kind", "evidence"} and value not in ({}, [])
    }
    details = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in said.items()
    )
    times = f" {count:,} times, the last one:" if count > 1 else ""
    return [f"<b>{html.escape(event['kind'])}</b>{times}", html.escape(details[:1000])]


def _configs(runs: Sequence[RunView]) -> str:
    parts = []
    for run in runs:
        name = html.escape(run.name)
        if not run.config:
            parts.append(f'<p class="gap">{name}: no run.yaml.</p>')
            continue
        cut = "\n... (cut here; the whole is in run.yaml)" if len(run.config) > _CONFIG_SHOWN else ""
        text = html.escape(run.config[:_CONFIG_SHOWN]) + cut
        parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "\n".join(parts)
