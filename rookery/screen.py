"""A run on a terminal: how it stands, its loss, its recurrence, where the time went, and what happened."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from monitoring.goodput import PARTS
from monitoring.reading.run_reader import RunReader
from monitoring.reading.run_table import Progress
from monitoring.reading.runview import RunView
from monitoring.standing import Standing, standing
from rookery.words import count, span

_READ_BYTES = 8 << 20
_LOOK_SECONDS = 1.0
_EIGHTHS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_MOODS = {"good": "bold green", "bad": "bold red", "": "bold yellow"}
_SLOW_NODES = 5
_SLOW = 1.05
_RECURRENCE = {
    "contraction": "contraction",
    "token_correlation": "correlation",
    "effective_rank": "rank",
    "first_jump": "first jump",
    "final_rms": "state RMS",
    "final_residual": "residual",
}
"""Probes shown, and what they are called here."""


def show(run_dir: Path) -> None:
    """Keep the terminal as the run is until interrupted; print one picture of it if the output is no terminal.

    Raises:
        RunLogError: there is no such run directory.
    """
    console = Console()
    reader = RunReader(run_dir)
    if not console.is_terminal:
        _read_all(reader)
        console.print(_look(reader, None, console.width, None))
        return
    read = -1
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            progress = reader.poll(_READ_BYTES)
            behind = read < progress.read < progress.total  # a torn last line stays unread
            read = progress.read
            size = console.size  # of this moment: its person may have resized it
            live.update(_look(reader, progress if behind else None, size.width, size.height), refresh=True)
            if not behind:
                time.sleep(_LOOK_SECONDS)


def snapshot(run_dir: Path) -> dict[str, Any]:
    """Return ready for JSON how a run stands: what the live page's head says, and what this screen shows.

    Raises:
        RunLogError: there is no such run directory.
    """
    reader = RunReader(run_dir)
    _read_all(reader)
    view = reader.view(time.time())
    return {
        **standing(run_dir, view, time.time()).to_dict(),
        "recurrence": _recurrence(view),
        "time": None if view.ledger is None else view.ledger.to_dict(),
        "slow_nodes": _slow_nodes(view),
        "incidents": [event for _, event in view.incidents[-20:]],
    }


def picture(
    view: RunView, now: Standing, when: float, progress: Progress | None, width: int, height: int | None
) -> RenderableType:
    """Return the screen.

    Args:
        view: what was read of the run.
        now: how it stands.
        when: unix seconds to look from.
        progress: how much of the log is read, as long as that is not all.
        width: columns of the terminal.
        height: its rows; None for as many as there is to say.
    """
    head = [_title(now), *_facts(now, width)]
    if progress is not None:
        head.append(Text(f"reading {progress.read / 1e9:.2f} of {progress.total / 1e9:.2f} GB", style="yellow"))
    head += [Text(f"! {warning}", style="red") for warning in now.warnings[:3]]
    blocks = [_numbers(view), _time_shares(view), _nodes(view), _happened(view, when), _checkpoints(view, when)]
    below = [block for block in blocks if block is not None]
    rows = 8 if height is None else max(3, min(12, height // 4))
    return Group(*head, Text(), *_loss_chart(view, width, rows), Text(), *below)


def _look(reader: RunReader, progress: Progress | None, width: int, height: int | None) -> RenderableType:
    when = time.time()
    view = reader.view(when)
    return picture(view, standing(reader.run_dir, view, when), when, progress, width, height)


def _read_all(reader: RunReader) -> None:
    read = -1
    while read < (now := reader.poll(_READ_BYTES).read):
        read = now


def _title(now: Standing) -> Text:
    text = Text.assemble((now.run, "bold"), "  ", (now.state, _MOODS[now.mood]), no_wrap=True, overflow="ellipsis")
    if now.since is not None:
        text.append(f" since {_clock(now.since)}")
    if now.attempt is not None and now.attempt > 1:
        text.append(f"  attempt {now.attempt}", style="dim")
    if now.detail:
        text.append(f"  {now.detail}", style="dim")
    return text


def _facts(now: Standing, width: int) -> list[Text]:
    """Return the figures of the head, as many in a line as fit."""
    facts: list[tuple[str, str, str]] = []
    if now.step is not None:
        of = f" of {now.steps:,} ({now.step / now.steps:.1%})" if now.steps else ""
        facts.append(("step", f"{now.step:,}{of}", ""))
    if now.loss is not None:
        finite = isinstance(now.loss, float)
        text = f"{now.loss:.4f}" if finite else str(now.loss)
        facts.append(("loss", text + (f" at r = {now.depth}" if now.depth else ""), "" if finite else "bold red"))
    if now.tokens_per_second is not None:
        facts.append(("tokens/s", count(now.tokens_per_second), ""))
    if now.seconds_left is not None:
        facts.append(("left", span(now.seconds_left), ""))
    if now.goodput is not None:
        facts.append(("goodput", f"{now.goodput:.1%}", ""))
    if now.state in ("running", "stalled"):
        late = "bold red" if now.state == "stalled" else ""
        facts += [("last step", f"{span(now.step_age)} ago", late)] if now.step_age is not None else []
        facts += [("heartbeat", f"{span(now.heartbeat_age)} ago", "")] if now.heartbeat_age is not None else []
    lines, used = [Text()], 0
    for name, value, style in facts:
        fact = Text.assemble((name, "dim"), " ", (value, style))
        if used and used + 3 + fact.cell_len > width:
            lines.append(Text())
            used = 0
        lines[-1].append("   " if used else "").append_text(fact)
        used += fact.cell_len + (3 if used else 0)
    return lines


def _loss_chart(view: RunView, width: int, rows: int) -> list[RenderableType]:
    """Return the loss of the current branch as columns of blocks, each the mean of an equal number of steps."""
    rows_shown = view.rows()
    losses = view.table.column("loss")[rows_shown]
    losses = losses[np.isfinite(losses)].astype(float)
    if not len(losses):
        return [Text("no loss logged yet", style="dim")]
    columns = max(10, min(width - 10, len(losses)))
    means = [float(part.mean()) for part in np.array_split(losses, columns)]
    low, high = min(means), max(means)
    steps = view.table.column("step")[rows_shown]
    lines: list[RenderableType] = [
        Text.assemble(
            f"{high:>8.3f} " if row == rows - 1 else f"{low:>8.3f} " if row == 0 else " " * 9,
            (_blocks(means, low, high, rows, row), "blue"),
            no_wrap=True,
        )
        for row in reversed(range(rows))
    ]
    per = len(losses) / columns
    label = "loss of every step" if per <= 1.0 else f"loss, mean of ~{per:,.0f} steps a column"
    lines.append(Text(f"{'':9}{label}, steps {steps[0]:,} to {steps[-1]:,}", style="dim", no_wrap=True))
    return lines


def _blocks(values: Sequence[float], low: float, high: float, rows: int, row: int) -> str:
    """Return one row, counted from below, of columns of blocks; the lowest value still has an eighth."""
    scale = (rows * 8 - 1) / (high - low) if high > low else 0.0
    heights = (1 + round((value - low) * scale) - 8 * row for value in values)
    return "".join(_EIGHTHS[max(0, min(8, height))] for height in heights)


def _recurrence(view: RunView) -> dict[str, float | int]:
    """Return the newest of every probe shown, and the step of the newest."""
    found: dict[str, float | int] = {}
    for name in _RECURRENCE:
        rows, values = view.probe(name)
        if len(rows):
            found[name] = float(values[-1])
            found["step"] = max(int(view.table.column("step")[rows[-1]]), found.get("step", 0))
    return found


def _numbers(view: RunView) -> RenderableType | None:
    found = _recurrence(view)
    if not found:
        return None
    parts = [(f"{label} ", "dim") for name, label in _RECURRENCE.items() if name in found]
    values = [f"{found[name]:.4g}   " for name in _RECURRENCE if name in found]
    text = Text()
    for label, value in zip(parts, values, strict=True):
        text.append(*label).append(value)
    return _titled("recurrence", text.append(f"(step {found['step']:,})", style="dim"))


def _time_shares(view: RunView) -> RenderableType | None:
    if view.ledger is None or not view.ledger.total > 0.0:
        return None
    parts = view.ledger.to_dict()
    text = Text()
    for name, label in PARTS.items():
        share = (parts[name] or 0.0) / view.ledger.total
        if share >= 0.0005:
            text.append(f"{label} ", style="dim").append(f"{share:.1%}   ")
    return _titled("time", text)


def _slow_nodes(view: RunView) -> dict[str, float]:
    """Return the nodes that took clearly longer than expected when last measured, slowest first, with the factor."""
    measured = view.samples("nodes")
    newest = measured[-1][1] if measured else {}
    slow = [(node, ratio) for node, ratio in newest.items() if ratio > _SLOW]
    return dict(sorted(slow, key=lambda pair: -pair[1])[:_SLOW_NODES])


def _nodes(view: RunView) -> RenderableType | None:
    slow = _slow_nodes(view)
    if not slow:
        return None
    return _titled("slow nodes", Text(", ".join(f"{node} x{ratio:.2f}" for node, ratio in slow.items())))


def _happened(view: RunView, now: float) -> RenderableType:
    events = [event for _, event in view.incidents[-5:]]
    if not events:
        return _titled("incidents", Text("none", style="dim"))
    lines = []
    for event in reversed(events):
        step = event.get("step", event.get("from_step"))
        words = [str(event[field]) for field in ("detector", "verdict", "host", "reason", "rule") if event.get(field)]
        line = Text(event["kind"].replace("_", " "), style="bold", no_wrap=True, overflow="ellipsis")
        line.append(f"  step {step:,}" if isinstance(step, int) else "", style="not bold")
        line.append(
            "".join(f"  {part}" for part in (_ago(event.get("time"), now), ", ".join(words))), style="not bold dim"
        )
        lines.append(line)
    return _titled("incidents", Group(*lines))


def _checkpoints(view: RunView, now: float) -> RenderableType:
    saved = [event for event in view.events if event["kind"] == "checkpoint"]
    if not saved:
        return _titled("checkpoints", Text("none yet", style="dim"))
    said = [
        f"{event['step']:,} ({', '.join(filter(None, (event.get('tier'), _ago(event.get('time'), now))))})"
        for event in reversed(saved[-4:])
        if isinstance(event.get("step"), int)
    ]
    return _titled("checkpoints", Text("   ".join(said)))


def _titled(title: str, body: RenderableType) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(min_width=11, no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    grid.add_row(title, body)
    return grid


def _ago(when: Any, now: float) -> str:
    return f"{span(now - when)} ago" if isinstance(when, int | float) and math.isfinite(when) else ""


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S}"
