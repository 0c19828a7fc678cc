"""Curves over steps as a small SVG file: panels one below the other, marks across all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_WIDTH, _HEIGHT, _GAP, _LEFT, _TOP, _RIGHT = 720, 110, 26, 64, 70, 12
_COLOURS = {"alarm": "#c0392b", "failure": "#555555"}


@dataclass(frozen=True)
class Curve:
    """One panel: a title, and values over steps; on a logarithmic axis values that are not positive are left out."""

    title: str
    steps: Sequence[float]
    values: Sequence[float]
    log: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line: `kind` is alarm or failure."""

    step: float
    text: str
    kind: str


def draw(path: Path, title: str, curves: Sequence[Curve], marks: Sequence[Mark]) -> None:
    """Write the file."""
    last = max(curve.steps[-1] for curve in curves)
    inner = _WIDTH - _LEFT - _RIGHT
    height = _TOP + len(curves) * (_HEIGHT + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height + 8}" font-size="11">',
        '<style>text {font-family: sans-serif}</style><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="16" font-size="14">{escape(title)}</text>',
    ]
    for number, curve in enumerate(curves):
        top = _TOP + number * (_HEIGHT + _GAP)
        parts += _panel(curve, last, inner, top)
    for number, mark in enumerate(marks):
        x, colour = _LEFT + inner * mark.step / last, _COLOURS[mark.kind]
        dash = "" if mark.kind == "alarm" else ' stroke-dasharray="4 3"'
        parts.append(f'<path d="M{x:.1f} {_TOP - 4}V{height - _GAP}" stroke="{colour}"{dash} fill="none"/>')
        anchor = "end" if x > _WIDTH * 0.7 else "start"
        y = 30 + 11 * (number % 4)
        parts.append(f'<text x="{x:.1f}" y="{y}" fill="{colour}" text-anchor="{anchor}">{escape(mark.text)}</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _panel(curve: Curve, last: float, inner: float, top: float) -> list[str]:
    points = [
        (step, math.log10(value) if curve.log else value)
        for step, value in zip(curve.steps, curve.values, strict=True)
        if math.isfinite(value) and (value > 0.0 or not curve.log)
    ]
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0
    line = " ".join(f"{_LEFT + inner * x / last:.1f},{top + _HEIGHT * (high - y) / span:.1f}" for x, y in points)
    parts = [
        f'<rect x="{_LEFT}" y="{top}" width="{inner}" height="{_HEIGHT}" fill="none" stroke="#ccc"/>',
        f'<polyline points="{line}" fill="none" stroke="#2874a6"/>',
        f'<text x="{_LEFT + 4}" y="{top + 13}">{escape(curve.title)}</text>',
    ]
    for value, y in ((high, top + 9), (low, top + _HEIGHT)):
        shown = 10.0**value if curve.log else value
        parts.append(f'<text x="{_LEFT - 4}" y="{y:.0f}" text-anchor="end">{shown:.2g}</text>')
    return [*parts, f'<text x="{_LEFT + inner}" y="{top + _HEIGHT + 13}" text-anchor="end">step {last:.0f}</text>']
