"""A page that carries its own script, style and data, so that it works from a disk, offline, for years.

Its content security policy forbids the browser every request and every script but the two whose checksums it names.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from itertools import groupby
from pathlib import Path
from string import Template

from monitoring.figures import Panel
from monitoring.runlog import RunLogError, write_atomic


def write_page(text: str, out: Path, noun: str) -> None:
    """Write a page to the file `out`, making its directory.

    Raises:
        RunLogError: the file cannot be written; the message calls it `noun`.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, text.encode())
    except OSError as error:
        raise RunLogError(f"cannot write the {noun} {out}: {error.strerror}; choose another file") from error


def render_page(
    panels: Sequence[Panel],
    *,
    title: str,
    brand: str,
    heading: str,
    as_of: str,
    before: str,
    after: str,
    chips: str = "",
) -> str:
    """Return the HTML of a page of panels.

    Args:
        panels: the plots, in order; one without traces says what is missing.
        title: plain text of the tab.
        brand: plain text above the heading.
        heading: plain text.
        as_of: plain text below the heading.
        before: HTML above the plots.
        after: HTML below them.
        chips: HTML of the buttons that hide runs.
    """
    script = asset("plots.js") + asset("report.js")
    figures = {panel.key: {"traces": panel.traces, "layout": panel.layout} for panel in panels if panel.traces}
    return Template(asset("report.html")).substitute(
        title=html.escape(title),
        brand=html.escape(brand),
        heading=html.escape(heading),
        as_of=html.escape(as_of),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        f"form-action 'none'; script-src {checksum(script)} {checksum(plotly_script())}",
        style=asset("report.css"),
        before=before,
        chips=chips,
        panels=panels_html(panels),
        after=after,
        plotly=packed_plotly(),
        figures=pack(json.dumps(figures, allow_nan=False, separators=(",", ":"))),
        script=script,
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Rows of cells that are HTML already; on a phone every row becomes a card that repeats the header's words."""
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "\n".join(
        "<tr>"
        + "".join(f'<td data-label="{name}"><div>{cell}</div></td>' for name, cell in zip(header, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll {kind}"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def panels_html(panels: Sequence[Panel]) -> str:
    """Return the panels under the headings of their groups.

    A panel without data takes one line, so that the page of a young run is not full of holes.
    """
    parts = []
    for group, members in groupby(panels, lambda panel: panel.group):
        together = list(members)
        if group:
            parts.append(f'<h2 class="group">{group}</h2>')
        inside = "\n".join(map(panel_html, together))
        parts.append(f'<div class="panels">\n{inside}\n</div>')
    return "\n".join(parts)


def panel_html(panel: Panel) -> str:
    """Return one panel: heading, caption and an empty plot, or one line that says what is missing."""
    place = f'class="panel {panel.width if panel.traces else "none"}" id="panel-{panel.key}"'
    if not panel.traces:
        return f'<section {place} aria-label="{panel.title}"><p class="gap">{panel.gap}</p></section>'
    plot = f'<div class="plot" id="plot-{panel.key}" role="img" aria-label="{panel.title}"></div>'
    return f'<section {place}><h3>{panel.title}</h3><p class="caption">{panel.caption}</p>{plot}</section>'


@cache
def plotly_script() -> str:
    """Return Plotly's script.

    Plotly rather than Bokeh: its figures are plain JSON, so that the style sheet themes them, and importing it costs
    0.06 s instead of 0.7 s. Its script is 4.8 MB (Bokeh's: 1.3 MB), but 2.0 MB packed, and browsers can unpack it.
    """
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script


@cache
def packed_plotly() -> str:
    """Return Plotly's script, packed."""
    return pack(plotly_script())


def asset(name: str) -> str:
    """Return the text of a file of `monitoring/assets`."""
    return (resources.files("monitoring") / "assets" / name).read_text(encoding="utf-8")


def checksum(script: str) -> str:
    """Return a script's source expression for a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def pack(text: str) -> str:
    """Return text as base64 of gzip, which `plots.unpack` reads."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
