"""`rookery depth`: what a run will draw and what it costs, printed and drawn before anything is submitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

_BARS = 24
_BAR_WIDTH = 40


def depth(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="Path of a YAML file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.  [default: train.steps]")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks whose work is compared.")] = 1,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it: a self-contained HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the depths that a run will draw, the FLOPs of its steps, and what its curricula save."""
    from pipeline.config import load_config
    from pipeline.forecast import forecast

    resolved = load_config(config, overrides or [])
    result = forecast(resolved, resolved.train.steps if steps is None else steps, ranks)
    if out is not None:
        from monitoring.forecast_page import write_forecast_page

        write_forecast_page(result, out)
    if as_json:
        print(json.dumps(result))
        return
    _print(result)
    if out is not None:
        print(f"{out}: open it in any browser; it loads nothing from elsewhere")


def _print(result: dict[str, Any]) -> None:
    recurrence, flops = result["recurrence"], result["flops"]
    table = Table(
        title=f"{result['name']}: {result['steps']:,} steps, {result['samples']:,} sequences", show_header=False
    )
    every = "" if result["drawn_steps"] == result["steps"] else f", from {result['drawn_steps']:,} of the steps"
    rows = {
        "depth": f"{result['sampler']}, {result['scope']}{every}",
        "recurrence": f"mean {recurrence['mean']:.2f} (expected {recurrence['expected']:.2f} at the end of all ramps),"
        f" std {recurrence['std']:.2f}, from {recurrence['min']} to {recurrence['max']}",
        "quantiles": "  ".join(f"{float(q):.1%}: {value:.0f}" for q, value in recurrence["quantiles"].items()),
        "FLOPs of a step": f"mean {flops['mean_step']:.3e}, from {flops['lowest_step']:.3e} to"
        f" {flops['highest_step']:.3e}",
        "FLOPs of all steps": f"{flops['total']:.3e}",
        "saved by curricula": f"{flops['saved']:.1%}",
    }
    if result["ranks"] > 1:
        rows["slowest rank"] = f"{result['imbalance']:.3f} x the mean of {result['ranks']} ranks"
    for name, text in rows.items():
        table.add_row(name, text)
    console = Console()
    console.print(table)
    for line in _histogram({int(r): count for r, count in result["histogram"].items()}):
        console.print(line, highlight=False)


def _histogram(counts: dict[int, int]) -> list[str]:
    """Return one line for each of `_BARS` ranges of depths; the last holds the long tail too."""
    total, seen, common = sum(counts.values()), 0, max(counts)
    for r, count in counts.items():
        seen += count
        if seen >= 0.995 * total:
            common = r
            break
    width = -(-common // _BARS)
    places = -(-common // width)
    sums = [0] * places
    for r, count in counts.items():
        sums[min((r - 1) // width, places - 1)] += count
    ends = [str((place + 1) * width) for place in range(places - 1)] + [str(max(*counts, places * width))]
    labels = [end if int(end) == i * width + 1 else f"{i * width + 1}-{end}" for i, end in enumerate(ends)]
    bars = ["#" * round(_BAR_WIDTH * count / max(sums)) for count in sums]
    first = (min(counts) - 1) // width
    lines = [f"r {label:>9} {count / total:7.2%} {bar}" for label, count, bar in zip(labels, sums, bars, strict=True)]
    return lines[first:]
