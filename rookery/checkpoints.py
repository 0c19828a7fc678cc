"""`rookery checkpoints`: what a run has saved, whether it is intact, and averages of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import ExitCode

app = typer.Typer(help="Checkpoints of a run.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
def list_(run: Run, as_json: AsJson = False) -> None:
    """List the checkpoints of a run, oldest first; reads their manifests only."""
    from pipeline.checkpoint import describe_checkpoints

    _print(describe_checkpoints(run, verify=False), as_json=as_json)


@app.command()
def verify(run: Run, as_json: AsJson = False) -> None:
    """Compare every file of every checkpoint with its recorded size and sha256; exit 12 and name what is broken."""
    from pipeline.checkpoint import describe_checkpoints

    found = describe_checkpoints(run, verify=True)
    _print(found, as_json=as_json)
    if any(entry["problem"] for entry in found):
        raise typer.Exit(ExitCode.BAD_INPUT)


@app.command()
def average(
    run: Run,
    last: Annotated[int, typer.Option(help="Number of checkpoints, back from the newest.")],
    beta: Annotated[float, typer.Option(help="Weight of the average so far at each checkpoint.")] = 0.9,
    every: Annotated[int, typer.Option(help="Take every so manieth checkpoint only.")] = 1,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Directory to make.  [default: in the run]")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the moving average of a run's newest checkpoints; `rookery eval` and `export` take it like a run."""
    from pipeline.average import average_checkpoints

    record = average_checkpoints(run, last=last, beta=beta, every=every, out=out)
    if as_json:
        print(json.dumps(record))
    else:
        steps = record["steps"]
        print(f"{record['out']}: average of {len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}")


def _print(found: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"ok": not any(entry["problem"] for entry in found), "checkpoints": found}))
        return
    for entry in found:
        if "step" not in entry:
            print(f"{entry['name']}: {entry['problem']}")
            continue
        facts = f"{entry['tokens']:,} tokens, {entry['bytes'] / 2**20:,.1f} MiB of {entry['ranks']} rank(s)"
        print(f"{entry['name']}: {facts}" + (f"; {entry['problem']}" if entry["problem"] else ""))
