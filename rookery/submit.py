"""`rookery submit` and `rookery sweep`: runs handed to a supercomputer's queue, or to this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from slurm.preflight import Prepared

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="Path of a YAML file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")]
SiteName = Annotated[str, typer.Option("--site", metavar="NAME", help="Where to run; see `rookery sites list`.")]
Nodes = Annotated[int, typer.Option(help="Nodes of the run.")]
Spares = Annotated[int, typer.Option(help="Nodes on top, to replace bad ones.")]
Time = Annotated[str | None, typer.Option(metavar="DURATION", help="Limit of a job: 90m, 2h.  [default: the site's]")]
Budget = Annotated[str | None, typer.Option(metavar="DURATION", help="Time of all jobs of the chain: 3d.")]
Partition = Annotated[str | None, typer.Option(help="Partition of the queue.")]
Qos = Annotated[str | None, typer.Option(help="Quality of service.")]
Account = Annotated[str | None, typer.Option(help="Account that pays.")]
Reservation = Annotated[str | None, typer.Option(help="Reserved nodes.")]
Stage = Annotated[list[Path] | None, typer.Option(metavar="FILE", help="File to copy to the nodes; repeatable.")]
EvalEvery = Annotated[int | None, typer.Option(metavar="K", help="Evaluate every K-th checkpoint in a job of its own.")]
EvalDepths = Annotated[str, typer.Option(help="Numbers of iterations of these evaluations.")]
MaxRestarts = Annotated[int, typer.Option(help="Launches in a row without a newer checkpoint that end the chain.")]
Sbatch = Annotated[list[str] | None, typer.Option(metavar="KEY[=VALUE]", help="Option of sbatch; repeatable.")]
SignalLead = Annotated[int | None, typer.Option(metavar="SECONDS", help="Warning before the time limit.")]
Chain = Annotated[str | None, typer.Option(help="requeue, afterany or array.  [default: the site's]")]
RanksPerNode = Annotated[int | None, typer.Option(help="Ranks of a node.  [default: one a device]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_DEPTHS = "1,2,4,8,16,32"
_SHOWN_JOBS = 5


def submit(  # noqa: PLR0913 (one a command line option)
    config: Config,
    site: SiteName,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    spares: Spares = 0,
    time: Time = None,
    budget: Budget = None,
    partition: Partition = None,
    qos: Qos = None,
    account: Account = None,
    reservation: Reservation = None,
    stage: Stage = None,
    eval_every: EvalEvery = None,
    eval_depths: EvalDepths = _DEPTHS,
    max_restarts: MaxRestarts = 3,
    sbatch: Sbatch = None,
    signal_lead: SignalLead = None,
    chain: Chain = None,
    ranks_per_node: RanksPerNode = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the batch script; submit and write nothing.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="With --dry-run: write the script there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Submit a run, as one job or as a chain of them, and say what to type next."""
    from slurm.preflight import Options, prepare
    from slurm.site import load_site

    if out is not None and not dry_run:
        raise ValueError("--out: is of use with --dry-run alone; the script of a submitted job is in RUN/jobs")
    options = Options(
        nodes=nodes,
        spares=spares,
        ranks_per_node=ranks_per_node,
        minutes=_minutes("--time", time),
        budget_minutes=_minutes("--budget", budget),
        partition=partition,
        qos=qos,
        account=account,
        reservation=reservation,
        chain=chain,
        signal_seconds=signal_lead,
        max_restarts=max_restarts,
        stage=stage or [],
        eval_every=eval_every,
        eval_depths=eval_depths,
        sbatch=_pairs(sbatch or []),
    )
    prepared = prepare(config, overrides or [], load_site(site), options)
    if dry_run:
        _dry_run(prepared, out, as_json=as_json)
        return
    from slurm.submission import submit as submit_run

    jobs = submit_run(prepared)
    _report(prepared, jobs, as_json=as_json)


def sweep(  # noqa: PLR0913 (one a command line option)
    config: Config,
    site: SiteName,
    overrides: Overrides = None,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2,...", help="An axis of the grid; repeatable.")
    ] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Most runs at a time.  [default: all]")] = None,
    nodes: Nodes = 1,
    time: Time = None,
    budget: Budget = None,
    partition: Partition = None,
    qos: Qos = None,
    account: Account = None,
    reservation: Reservation = None,
    stage: Stage = None,
    max_restarts: MaxRestarts = 3,
    sbatch: Sbatch = None,
    signal_lead: SignalLead = None,
    chain: Chain = None,
    ranks_per_node: RanksPerNode = None,
    as_json: AsJson = False,
) -> None:
    """Submit one run for every combination of a grid of overrides, as an array of jobs."""
    from slurm.preflight import Options
    from slurm.site import load_site
    from slurm.sweep import prepare_sweep, submit_sweep

    options = Options(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        minutes=_minutes("--time", time),
        budget_minutes=_minutes("--budget", budget),
        partition=partition,
        qos=qos,
        account=account,
        reservation=reservation,
        chain=chain,
        signal_seconds=signal_lead,
        max_restarts=max_restarts,
        stage=stage or [],
        sbatch=_pairs(sbatch or []),
    )
    folder, runs = prepare_sweep(config, overrides or [], grid or [], load_site(site), options)
    _warn(runs[0].warnings)
    jobs = submit_sweep(folder, runs, parallel)
    listed = [{"run_dir": run.request.run_dir, "job": job} for run, job in zip(runs, jobs, strict=True)]
    if as_json:
        print(json.dumps({"folder": str(folder), "site": runs[0].site.name, "runs": listed}))
        return
    for entry in listed:
        print(f"{entry['job']}  {entry['run_dir']}")
    print(f"{len(listed)} runs in {folder}; look with `rookery status RUN`")


def _dry_run(prepared: Prepared, out: Path | None, *, as_json: bool) -> None:
    from slurm.steps import shown_step
    from slurm.submission import batch_script

    script, step = batch_script(prepared.site, prepared.request), shown_step(prepared.site, prepared.request)
    if out is not None:
        try:
            out.write_text(script, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--out {out}: {error.strerror}; name a file that can be written") from None
    if as_json:
        print(json.dumps(_facts(prepared) | {"script": script, "step": step, "warnings": prepared.warnings}))
        return
    # Standard output is the script and nothing else.
    _warn(prepared.warnings)
    print(script, end="")
    _say("nothing was submitted; in the job, the ranks are started by")
    print(f"  {step}", file=sys.stderr)
    if prepared.request.chain == "afterany" and prepared.request.links > 1:
        _say(f"{prepared.request.links - 1} more links: the same script with --dependency=afterany:JOB")


def _report(prepared: Prepared, jobs: Sequence[str], *, as_json: bool) -> None:
    run_dir, site = Path(prepared.request.run_dir), prepared.site
    first = jobs[0].split("_")[0]
    script = None if site.scheduler == "local" else str(run_dir / "jobs" / f"{first}_submission.sh")
    log = run_dir / "jobs" / f"{jobs[0]}_0_log.out"
    state = _state(jobs[0], local=site.scheduler == "local")
    following = [f"rookery status {run_dir}", f"tail -F {log}", f"rookery cancel {run_dir}"]
    if as_json:
        facts = {"jobs": list(jobs), "script": script, "state": state, "next": following}
        print(json.dumps(_facts(prepared) | facts | {"warnings": prepared.warnings}))
        return
    _warn(prepared.warnings)
    shown = ", ".join(jobs[:_SHOWN_JOBS]) + (f", ... {jobs[-1]}" if len(jobs) > _SHOWN_JOBS else "")
    print(f"job {shown}: {_summary(prepared)}")
    print(f"  state   {state}")
    print(f"  run     {run_dir}")
    if script is not None:
        print(f"  script  {script}")
    print("next:")
    for line in following:
        print(f"  {line}")


def _summary(prepared: Prepared) -> str:
    from slurm.limits import show_duration

    request = prepared.request
    ranks = request.nodes * request.ranks_per_node
    spares = f" and {request.spares} spare" if request.spares else ""
    where = f"{request.nodes} node{'s' if request.nodes > 1 else ''}{spares} of {request.site}, {ranks} ranks"
    if prepared.site.scheduler == "local":
        return f"{request.name} on this machine, {ranks} ranks"
    links = f"{request.links} links ({request.chain}) of " if request.links > 1 else ""
    return f"{request.name} on {where}, {links}{show_duration(request.minutes)}"


def _facts(prepared: Prepared) -> dict[str, Any]:
    request = prepared.request
    names = ("name", "run_dir", "site", "nodes", "spares", "ranks_per_node", "minutes", "links", "chain", "partition")
    more = ("qos", "account", "reservation", "signal_seconds", "digest")
    return {name: getattr(request, name) for name in (*names, *more)}


def _state(job: str, *, local: bool) -> str:
    from slurm.queue import QueueError, job_states, local_jobs

    try:
        found = local_jobs([job]) if local else job_states([job], patience=2.0)
    except QueueError:
        found = {}
    if job not in found:
        return "unknown"
    return found[job].state + (f" ({found[job].reason})" if found[job].reason not in ("", "None") else "")


def _minutes(option: str, text: str | None) -> int | None:
    from slurm.limits import parse_duration

    if text is None:
        return None
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from None


def _pairs(words: Sequence[str]) -> dict[str, str]:
    """Return KEY=VALUE words as a mapping; a word without value is a flag."""
    pairs = {}
    for word in words:
        key, _, value = word.partition("=")
        if not key:
            raise ValueError(f"--sbatch {word}: write it as KEY=VALUE, or KEY for a flag")
        pairs[key] = value
    return pairs


def _warn(warnings: Sequence[str]) -> None:
    for text in warnings:
        _say(f"warning: {text}")


def _say(text: str) -> None:
    print(f"rookery: {text}", file=sys.stderr, flush=True)
