"""`rookery checkpoints`: what a run has saved, whether it is intact, what stays, averages and conversions of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import ExitCode

app = typer.Typer(help="Checkpoints of a run.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
RunOrCheckpoint = Annotated[
    Path, typer.Argument(metavar="RUN", help="Directory of a run, or of one of its checkpoints.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
OtherOwners = Annotated[bool, typer.Option("--other-owners", help="Read files that belong to another user.")]

_MANY_BYTES = 2**30


@app.command("list")
def list_(run: RunOrCheckpoint, other_owners: OtherOwners = False, as_json: AsJson = False) -> None:
    """List the checkpoints of a run, oldest first, and why each is kept; reads their manifests only."""
    from pipeline.checkpoints.inventory import describe_checkpoints

    found = describe_checkpoints(run, other_owners=other_owners)
    if as_json:
        print(json.dumps({"checkpoints": found}))
    else:
        _print(found)


@app.command()
def verify(run: RunOrCheckpoint, other_owners: OtherOwners = False, as_json: AsJson = False) -> None:
    """Compare every file of every checkpoint with its recorded size and checksum; exit 12 and name what is broken."""
    from pipeline.checkpoints.inventory import verify_checkpoints

    with _bytes_display("verify") as progress:
        found = verify_checkpoints(run, other_owners=other_owners, progress=progress)
    ok = not any(entry["problem"] for entry in found)
    if as_json:
        print(json.dumps({"ok": ok, "checkpoints": found}))
    else:
        _print(found)
    if not ok:
        raise typer.Exit(ExitCode.BAD_INPUT)


@app.command()
def prune(  # noqa: PLR0913 - a parameter a flag
    run: Run,
    keep_last: Annotated[int | None, typer.Option(help="Newest checkpoints, at least 2.  [default: the run's]")] = None,
    keep_every: Annotated[int | None, typer.Option(help="One in so many steps.  [default: the run's]")] = None,
    keep_best: Annotated[int | None, typer.Option(help="Best by validation.  [default: the run's]")] = None,
    keep_healthy: Annotated[int | None, typer.Option(help="Healthy and older ones.  [default: the run's]")] = None,
    healthy_horizon: Annotated[int | None, typer.Option(help="Older by so many steps.  [default: the run's]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    other_owners: OtherOwners = False,
    as_json: AsJson = False,
) -> None:
    """Remove the checkpoints that the run's rules do not keep; never the newest intact one, nor a broken one."""
    from pipeline.checkpoints.inventory import prune_run

    given = {
        "keep_last": keep_last,
        "keep_every": keep_every,
        "keep_best": keep_best,
        "keep_healthy": keep_healthy,
        "healthy_horizon": healthy_horizon,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    done = prune_run(run, changes, dry_run=dry_run, other_owners=other_owners)
    if as_json:
        print(json.dumps(done))
        return
    for name in done["removed"]:
        print(f"{name}: {'would be removed' if dry_run else 'removed'}")
    for name, reasons in done["kept"].items():
        print(f"{name}: kept ({', '.join(reasons)})")
    for name, problem in done["broken"].items():
        print(f"{name}: left as it is; {problem}")
    print(f"{run}: {len(done['removed'])} {'to remove' if dry_run else 'removed'}, {_size(done['bytes'])}")


@app.command()
def average(
    run: Run,
    last: Annotated[int, typer.Option(help="Number of checkpoints, back from the newest.")],
    beta: Annotated[float, typer.Option(help="Weight of the average so far at each checkpoint.")] = 0.9,
    every: Annotated[int, typer.Option(help="Take every so manieth checkpoint only.")] = 1,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Directory to make.  [default: in the run]")] = None,
    other_owners: OtherOwners = False,
    as_json: AsJson = False,
) -> None:
    """Write the moving average of a run's newest checkpoints; `rookery eval` and `export` take it like a run."""
    from pipeline.checkpoints.average import average_checkpoints

    record = average_checkpoints(run, last=last, beta=beta, every=every, out=out, other_owners=other_owners)
    if as_json:
        print(json.dumps(record))
    else:
        steps = record["steps"]
        print(f"{record['out']}: average of {len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}")


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run for its newest intact one.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    shards: Annotated[int, typer.Option(help="Number of files.")] = 1,
    without_optimizer: Annotated[bool, typer.Option("--without-optimizer", help="Write the weights alone.")] = False,
    other_owners: OtherOwners = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as other files, with the tokenizer; `rookery eval` and `export` take it like a run."""
    from pipeline.checkpoints.convert import convert_checkpoint

    done = convert_checkpoint(
        checkpoint, out, shards=shards, with_optimizer=not without_optimizer, other_owners=other_owners
    )
    if as_json:
        print(json.dumps(done))
    else:
        what = f"with {', '.join(done['optimizer_state'])}" if done["optimizer_state"] else "weights alone"
        print(f"{out}: step {done['step']} in {done['files']} file(s), {_size(done['bytes'])}, {what}")


def _print(found: list[dict[str, Any]]) -> None:
    for entry in found:
        problem = f"; {entry['problem']}" if entry["problem"] else ""
        print(
            f"{entry['name']}: {_facts(entry)}{problem}" if "step" in entry else f"{entry['name']}: {entry['problem']}"
        )


def _facts(entry: dict[str, Any]) -> str:
    facts = [
        f"{entry['tokens']:,} tokens",
        f"{_size(entry['bytes'])} in {entry['files']} file(s) of {entry['ranks']} rank(s)",
        f"{_age(time.time() - entry['time'])} ago",
        f"health {entry['verdict']}",
    ]
    if entry["validation_loss"] is not None:
        facts.append(f"validation loss {entry['validation_loss']:.4f}")
    if entry["kept"] is not None:
        facts.append(f"kept as {' and '.join(entry['kept'])}" if entry["kept"] else "no rule keeps it")
    return ", ".join(facts)


def _size(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB" if number < 2**30 else f"{number / 2**30:,.1f} GiB"


def _age(seconds: float) -> str:
    for unit, length in (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"


@contextmanager
def _bytes_display(name: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes (bytes done, bytes in all): a bar on a terminal if they are many."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(name), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=total >= _MANY_BYTES)
