"""Incidents and crashes of runs as HTML: what happened, and the evidence that it is said on."""

from __future__ import annotations

import html
from collections.abc import Sequence

from monitoring.page import table
from monitoring.reading.runview import RunView, as_text, number
from monitoring.runlog import Record

_INCIDENTS_SHOWN = 200
_TEXT_SHOWN = 20_000


def incidents_html(runs: Sequence[RunView]) -> str:
    """Return a row an incident, newest first, each with a link to its evidence in a block below."""
    rows, evidence = [], []
    hidden = 0
    for index, run in enumerate(runs):
        found = run.incidents
        hidden += max(len(found) - _INCIDENTS_SHOWN, 0)
        for place, event in reversed(found[-_INCIDENTS_SHOWN:]):
            anchor = f"incident-{index}-{place}"
            title = f"{_step(event)} {event['kind']} {event.get('detector', '')}"
            rows.append([html.escape(run.name), *_row(event), f'<a href="#{anchor}">evidence</a>'])
            evidence.append(_block(anchor, f"{run.name}, {title}", as_text(event)))
    if not rows:
        return '<p class="gap">No incident.</p>'
    note = f"<p>{hidden:,} older incidents are in events.jsonl.</p>" if hidden else ""
    header = ("run", "step", "incident", "detector", "what", "")
    blocks = f"<details><summary>Evidence of {len(rows):,} incidents</summary>{''.join(evidence)}</details>"
    return table(header, rows, "events incidents") + note + blocks


def crashes_html(runs: Sequence[RunView]) -> str:
    """Return a block an attempt that ended badly: class, first failing rank, its last lines, stacks, last steps."""
    blocks = [
        _crash(f"crash-{index}-{place}", run.name, report)
        for index, run in enumerate(runs)
        for place, report in enumerate(run.crashes)
    ]
    return "".join(blocks) or '<p class="gap">No attempt crashed.</p>'


def _row(event: Record) -> list[str]:
    kind = html.escape(event["kind"].replace("_", " "))
    return [
        _step(event),
        f"<b>{kind}</b>",
        html.escape(str(event.get("detector", ""))),
        html.escape(_said(event)[:500]),
    ]


def _step(event: Record) -> str:
    step = number(event, "from_step" if "from_step" in event else "step")
    return "" if step is None else f"{step:,.0f}"


def _said(event: Record) -> str:
    """Return what an incident was, in words."""
    if event["kind"] == "finding":
        value, threshold = number(event, "value"), number(event, "threshold")
        limits = "" if value is None or threshold is None else f": {value:.4g} against {threshold:.4g}"
        action = str(event.get("action") or "no action named")
        acted = action if event.get("acted") is True or action == "warn" else f"{action}, not done"
        return f"{event.get('rule') or 'a detector fired'}{limits}, since step {event.get('since', '?')} ({acted})"
    if event["kind"] == "rollback":
        rate = number(event, "rate_factor")
        lowered = "" if rate in (None, 1.0) else f", learning rate times {rate:g}"
        reason = f": {event['reason']}" if event.get("reason") else ""
        return f"back to step {event.get('to_step', '?')}, branch {event.get('branch', '?')}{lowered}{reason}"
    skipped = {"kind", "time", "attempt", "step", "detector", "evidence"}
    said = {key: value for key, value in event.items() if key not in skipped}
    return str(said.pop("reason", "")) + "".join(f" {key} {value}" for key, value in said.items())


def _crash(anchor: str, run: str, report: Record) -> str:
    summary = html.escape(f"{run}, attempt {report.get('attempt', '?')}: {str(report.get('summary', ''))[:500]}")
    known = {key: report[key] for key in _FACTS if report.get(key) not in (None, "", [], {})}
    facts = "".join(
        f"<dt>{key.replace('_', ' ')}</dt><dd>{html.escape(_plain(value)[:2000])}</dd>" for key, value in known.items()
    )
    lines = [str(line) for line in report["lines"]] if isinstance(report.get("lines"), list) else []
    blocks = [_block(f"{anchor}-lines", f"last {len(lines)} lines", "\n".join(lines))] if lines else []
    stacks = report["stacks"] if isinstance(report.get("stacks"), list) else []
    for place, stack in enumerate(stacks):
        if isinstance(stack, dict):
            title = f"stacks of rank {stack.get('rank')} ({stack.get('source')})"
            blocks.append(_block(f"{anchor}-stack-{place}", title, str(stack.get("text", ""))))
    if last := report.get("last_steps"):
        blocks.append(_block(f"{anchor}-ranks", "last step of every rank", as_text(last)))
    return f'<details id="{anchor}"><summary>{summary}</summary><dl>{facts}</dl>{"".join(blocks)}</details>'


_FACTS = ("class", "kind", "rank", "host", "step", "phase", "exit_code", "status", "job", "nodes", "log", "evidence")


def _plain(value: object) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _block(anchor: str, title: str, text: str) -> str:
    """Return text behind a title; a link to the anchor opens it."""
    cut = "\n... (cut here)" if len(text) > _TEXT_SHOWN else ""
    content = html.escape(text[:_TEXT_SHOWN]) + cut
    return f'<details><summary>{html.escape(title)}</summary><pre id="{anchor}">{content}</pre></details>'
