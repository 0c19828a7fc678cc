"""The commands of `rookery`. Every import of a room is inside its command: `rookery --help` starts no torch."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import rookery.alerts
import rookery.checkpoints
import rookery.data
import rookery.depth
import rookery.plan
import rookery.samples
import rookery.sites
import rookery.status
import rookery.submit
import rookery.watch
from monitoring.runlog import write_atomic
from pipeline import job_variables
from pipeline.errors import ExitCode, RunError, UnhealthyNodeError
from rookery.checkpoints import OtherOwners
from rookery.display import training_display

if TYPE_CHECKING:
    from data_prep.world import Control, World

app = typer.Typer(
    help="Train recurrent-depth language models on AMD and NVIDIA supercomputers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(rookery.data.app, name="data")
app.add_typer(rookery.checkpoints.app, name="checkpoints")
app.command()(rookery.depth.depth)
app.command()(rookery.plan.plan)
app.command()(rookery.submit.submit)
app.command()(rookery.submit.sweep)
app.command()(rookery.status.status)
app.command()(rookery.status.cancel)
app.command()(rookery.status.doctor)
app.add_typer(rookery.sites.app, name="sites")
app.command()(rookery.watch.watch)
app.command()(rookery.alerts.alerts)
rookery.data.app.command()(rookery.samples.order)
rookery.data.app.command()(rookery.samples.show)

INTERRUPTED = 130
_SECONDS_TO_SPEAK = 5.0
_SECONDS_TO_LEAVE = 10.0
_SECONDS_TO_FORWARD = 1.0  # a launcher that is told to abort drops what it has not yet read

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="Path of a YAML file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as in train.steps=1000.")
]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint directory, or a run directory for its newest one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train a run, or resume it from its newest intact checkpoint; under mpiexec or srun, on all ranks."""
    import faulthandler

    from data_prep.world import World
    from pipeline.control import StopSignals

    faulthandler.enable()  # a rank that ends by a fault of memory leaves its stacks in the log
    signals = StopSignals()
    signals.listen()  # a job may be told to end while its ranks still import torch
    world = World.discover(_connect_without_mpi)
    with world.guard("configuration"):
        from pipeline.config import load_config
        from pipeline.train import train as run_training

        resolved = load_config(config, overrides or [])

    def on_alarm(text: str) -> None:
        print(f"rookery: {text}", file=sys.stderr, flush=True)

    with training_display(resolved.name, resolved.train.steps, shown=world.rank == 0) as on_step:
        code, reason = run_training(resolved, world, on_step, on_alarm, signals)
    if world.rank == 0:
        print(f"{resolved.run_dir}: {reason}", flush=True)
        _write_verdict(code, reason)
    _leave_together(world)
    raise typer.Exit(code)


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    depths: Annotated[str, typer.Option(help="Numbers of iterations, separated by commas.")] = "1,2,4,8,16,32",
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Dataset; default: the run's validation set.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Evaluate on the first rows only.")] = None,
    other_owners: OtherOwners = False,
    as_json: AsJson = False,
) -> None:
    """Measure the validation loss at several depths."""
    _require_one_rank("eval")
    from pipeline.evaluate import evaluate_checkpoint, parse_depths
    from rookery.display import evaluation_table

    result = evaluate_checkpoint(
        checkpoint, parse_depths(depths), data=data, max_rows=max_rows, other_owners=other_owners
    )
    if as_json:
        print(json.dumps(result))
    else:
        evaluation_table(result)


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    other_owners: OtherOwners = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in the layout of Hugging Face, and compare what was written with the checkpoint."""
    _require_one_rank("export")
    from pipeline.export import export_checkpoint

    difference = export_checkpoint(checkpoint, out, other_owners=other_owners)
    if as_json:
        print(json.dumps({"out": str(out), "max_abs_logit_diff": difference}))
    else:
        print(f"{out}: logits differ from the checkpoint's by at most {difference:.1e}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; several are compared.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
) -> None:
    """Write one self-contained HTML page about one run or several."""
    _require_one_rank("report")
    from monitoring.report import write_report

    write_report(runs, out)
    print(f"{out}: open it in any browser; it loads nothing from elsewhere")


@app.command()
def smoke(
    workdir: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the run.")] = Path("runs/smoke"),
) -> None:
    """Run the whole chain, small, on this machine: text, tokens, training, kill, resume, eval, export, report."""
    _require_one_rank("smoke")
    from rookery.smoke import run_smoke

    raise typer.Exit(run_smoke(workdir))


def _connect_without_mpi() -> Control:
    from pipeline.gloo_control import connect

    return connect()


def _require_one_rank(command: str) -> None:
    from data_prep.world import World

    world = World.discover()
    with world.guard(command):
        if world.size > 1:
            raise ValueError(f"`rookery {command}` runs on one rank; start it without the MPI launcher")


def main() -> int:
    """Run the command line; return the exit code of docs/architecture.md."""
    # Idle OpenMP threads that spin take the cores from other ranks: a busy machine becomes several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        return app(standalone_mode=False) or 0
    except typer.TyperException as error:
        # Every rank has the same arguments, so every rank is here.
        if error.format_message() and _world_or_alone().rank == 0:  # no arguments: the help has been printed
            print(f"rookery: {error.format_message()} (see `rookery --help`)", file=sys.stderr)
        return ExitCode.BAD_INPUT
    except (typer.Abort, KeyboardInterrupt):
        _world_or_alone().abort(INTERRUPTED)
        return INTERRUPTED
    except Exception as error:
        return _report_failure(error)


def _report_failure(error: Exception) -> int:
    world = _world_or_alone()
    if isinstance(error, UnhealthyNodeError):
        return _report_unhealthy_node(error, world)
    code = int(ExitCode.BAD_INPUT) if isinstance(error, ValueError) else 1
    if world.rank == 0 or not world.failed_together:
        if code == ExitCode.BAD_INPUT:
            print(f"rookery: {error}", file=sys.stderr, flush=True)
        elif isinstance(error, RunError):
            where = "the traceback is in failure-*.json of the run's newest directory in attempts/"
            print(f"rookery: {error} ({where})", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
        if code == ExitCode.BAD_INPUT:
            _write_verdict(code, str(error))
    if not world.failed_together:
        if world.size > 1:
            time.sleep(_SECONDS_TO_FORWARD)
        world.abort(code)
    _leave_together(world)
    return code


def _write_verdict(code: int, reason: str) -> None:
    """Leave how it ended where whoever started the ranks asked for it: no attempt says it where none began."""
    path = os.environ.get(job_variables.REFUSAL)
    if path:
        with suppress(OSError):  # it has been printed as well
            write_atomic(Path(path), json.dumps({"code": int(code), "reason": reason}).encode())


def _leave_together(world: World) -> None:
    """Wait for the others: srun --kill-on-bad-exit kills those that still speak when the first has ended."""
    if world.size > 1:
        world.meet(_SECONDS_TO_LEAVE)


def _world_or_alone() -> World:
    from data_prep.world import World

    try:
        return World.discover()
    except ValueError:  # the launcher and MPI disagree, or there is no MPI
        return World()


def _report_unhealthy_node(error: UnhealthyNodeError, world: World) -> int:
    if error.speaks(world.rank):
        print(f"rookery: unhealthy node: {error}", file=sys.stderr, flush=True)
    elif not world.failed_together:
        time.sleep(_SECONDS_TO_SPEAK)  # the one that speaks ends the others
    if not world.failed_together:
        world.abort(ExitCode.UNHEALTHY_NODE)
    _leave_together(world)
    return ExitCode.UNHEALTHY_NODE
