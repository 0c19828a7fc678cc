"""Numbers as people read them."""

from __future__ import annotations


def count(number: float) -> str:
    """Return a large number with a unit."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,.0f}"


def span(seconds: float) -> str:
    """Return a length of time in the units that fit it."""
    minutes = round(max(0.0, seconds) / 60)
    if seconds < 100.0:
        return f"{max(0.0, seconds):.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return (
        f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes // 1440} d {minutes // 60 % 24} h"
    )
