"""`rookery status`, `cancel` and `doctor`: how a run stands, ending it, and whether a site is ready for one."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from monitoring.goodput import PARTS
from pipeline.errors import ExitCode
from rookery.words import count, span

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_ATTEMPTS_SHOWN = 8
_JOBS_SHOWN = 5
_LABEL = 12
# SLURM's commonest reasons in words; the others are shown as they are.
_REASONS = {
    "Priority": "others are before it",
    "Resources": "next, as soon as nodes are free",
    "Dependency": "waits for the link before it",
    "DependencyNeverSatisfied": "will never start: the link before it failed; cancel the run and submit it again",
    "JobArrayTaskLimit": "waits for the link before it",
    "BeginTime": "waits for its time: it was put back into the queue, or was to begin later",
    "JobHeldUser": "held; scontrol release it",
    "JobHeldAdmin": "held by the site",
    "ReqNodeNotAvail": "nodes are down or reserved",
    "QOSMaxJobsPerUserLimit": "you have as many jobs as this QOS allows",
    "AssocGrpCPUMinutesLimit": "the account has no time left",
    "AssocGrpBillingMinutes": "the account has no time left",
}


def status(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]", help="Directory of a run, or of a sweep.  [default: all below ./runs and queued]"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how a run stands: its jobs in the queue, its attempts, step, loss, speed, goodput and last checkpoint."""
    from slurm.status import status as ask

    if run is None or _runs_of_sweep(run):
        _all_runs(run, as_json=as_json)
        return
    answer = ask(run)
    if as_json:
        print(json.dumps(answer))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print("\n".join(describe(answer, time.time(), width)))


def cancel(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="Do not let it save first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop a run, or all of a sweep: what waits leaves the queue, what runs saves a checkpoint and ends."""
    from slurm.cancel import cancel as stop

    done: dict[str, list[str]] = {}
    for each in _runs_of_sweep(run) or [run]:
        for what, jobs in stop(each, now=now).items():
            done.setdefault(what, []).extend(jobs)
    if as_json:
        print(json.dumps(done))
        return
    for what, names in (("out of the queue", done["cancelled"]), ("killed", done["killed"])):
        if names:
            print(f"{what}: {', '.join(names)}")
    if done["signalled"]:
        print(f"told to save and end: {', '.join(done['signalled'])}; `rookery status {run}` shows when it has")
    if done["left"]:
        print(f"evaluations that run and may finish: {', '.join(done['left'])}; --now would kill them")
    if not any(done.values()):
        print(f"{run}: nothing waits or runs")


def doctor(
    site: Annotated[str, typer.Option(help="Name of a site profile; `rookery sites list` shows them.")],
    in_job: Annotated[
        bool, typer.Option("--in-job", help="Also try the devices of this node: memory, GEMM, all-reduce.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON object to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check what a site needs before a run, one line each with a remedy; exit 12, or 13 for an unhealthy node."""
    from slurm.doctor import examine

    answer = examine(site, in_job=in_job)
    if out is not None:
        from monitoring.runlog import write_atomic

        write_atomic(out, json.dumps(answer).encode())
    if as_json:
        print(json.dumps(answer))
    else:
        for check in answer["checks"]:
            remedy = f"; {check['remedy']}" if check["remedy"] else ""
            print(f"{check['verdict']:<5} {check['name']:<16} {check['found']}{remedy}")
    if not answer["ok"]:
        raise typer.Exit(ExitCode.UNHEALTHY_NODE if answer["unhealthy"] else ExitCode.BAD_INPUT)


def describe(answer: dict[str, Any], now: float, width: int | None = None) -> list[str]:
    """Return the lines that show how a run stands.

    Args:
        answer: what `slurm.status.status` returned.
        now: unix seconds.
        width: longest line; None for any length, so that `grep` finds what belongs together.
    """
    lines = [f"{answer['run']}: {_head(answer)}"]
    lines += _block("progress", _progress(answer))
    lines += _block("time", _time(answer["ledger"]))
    lines += _block("checkpoint", [_checkpoint(answer["checkpoint"])] if answer["attempts"] else [])
    ended = answer["over"] is not None  # the queue forgets its jobs minutes later
    lines += _block("jobs", _jobs([job for job in answer["jobs"] if not ended or job["state"] != "GONE"], now))
    failed = next((attempt for attempt in reversed(answer["attempts"]) if attempt["crash"] is not None), None)
    lines += _block("attempts", _attempts(answer["attempts"], failed))
    lines += _block("crash", _crash(failed))
    lines += _block("avoided", [f"{node}: {reason}" for node, reason in answer["quarantine"].items()])
    lines += _block("warning", answer["warnings"])
    return lines if width is None else [part for line in lines for part in _wrapped(line, width)]


def _wrapped(line: str, width: int) -> list[str]:
    indent = " " * (_LABEL + 4)
    wrapped = textwrap.wrap(
        line, max(width, 40), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return wrapped or [line]


def _block(label: str, lines: list[str]) -> list[str]:
    return [f"  {label if index == 0 else '':<{_LABEL}}{line}" for index, line in enumerate(lines)]


def _head(answer: dict[str, Any]) -> str:
    over, chain = answer["over"], answer["chain"]
    reason = f" ({over['reason']})" if over is not None and over["reason"] else ""
    where = [f"{answer['site']}"] if answer["site"] else []
    where += [f"{answer['nodes']} {'node' if answer['nodes'] == 1 else 'nodes'}"] if answer["nodes"] else []
    if chain is not None and chain["links"]:
        kind = f" ({chain['kind']})" if chain["links"] > 1 else ""
        where.append(f"{chain['used']} of {chain['links']} {'link' if chain['links'] == 1 else 'links'} begun{kind}")
    return f"{answer['state']}{reason}" + (f" - {', '.join(where)}" if where else "")


def _progress(answer: dict[str, Any]) -> list[str]:
    if answer["step"] is None:
        return [f"no step yet, of {answer['steps']:,}"] if answer["steps"] else ["no step yet"]
    of = f" of {answer['steps']:,} ({answer['step'] / answer['steps']:.1%})" if answer["steps"] else ""
    parts = [f"step {answer['step']:,}{of}"]
    parts += [f"{count(answer['tokens'])} tokens"] if answer["tokens"] is not None else []
    parts += [f"loss {float(answer['loss']):.4f}"] if answer["loss"] is not None else []
    lines = ["  ".join(parts)]
    parts = [f"{count(answer['tokens_per_second'])} tok/s"] if answer["tokens_per_second"] is not None else []
    share = answer["ledger"]["share"]
    parts += [f"goodput {share:.0%}"] if share is not None else []
    left = answer["seconds_left"]
    parts += [f"about {span(left)} of training left"] if left and answer["state"] == "running" else []
    return [*lines, "  ".join(parts)] if parts else lines


def _time(ledger: dict[str, float]) -> list[str]:
    """Where the time went, what took most of it first; what took less than a half per cent is left out."""
    if not ledger["total"]:
        return []
    parts = sorted(((ledger[part] / ledger["total"], words) for part, words in PARTS.items()), reverse=True)
    shown = ", ".join(f"{share:.0%} {words}" for share, words in parts if share >= 0.005)
    return [f"{span(ledger['total'])}: {shown}"]


def _checkpoint(found: dict[str, Any] | None) -> str:
    return "none yet" if found is None else f"step {found['step']:,}, {span(found['age_seconds'])} old"


def _jobs(jobs: list[dict[str, Any]], now: float) -> list[str]:
    lines = []
    for job in jobs[:_JOBS_SHOWN]:
        facts = [_REASONS.get(job.get("reason", ""), job.get("reason", ""))]
        if job.get("expected_start") is not None:
            facts.append(f"expected to start in {span(job['expected_start'] - now)}")
        if job.get("time_left_seconds") is not None:
            facts.append(f"{span(job['time_left_seconds'])} until its time limit")
        facts += [f"on {job['node_list']}"] if job.get("node_list") else []
        facts += [f"requeued {job['restarts']} times"] if job.get("restarts", 0) > 1 else []
        lines.append(f"{job['id']:<10} {job['state']:<10} {', '.join(fact for fact in facts if fact)}".rstrip())
    if len(jobs) > _JOBS_SHOWN:
        lines.append(f"and {len(jobs) - _JOBS_SHOWN} more links behind")
    return lines


def _attempts(attempts: list[dict[str, Any]], explained: dict[str, Any] | None) -> list[str]:
    hidden = len(attempts) - _ATTEMPTS_SHOWN
    lines = [f"{hidden} before these"] if hidden > 0 else []
    for attempt in attempts[-_ATTEMPTS_SHOWN:]:
        steps = "no steps" if attempt["steps"] is None else "steps {}-{}".format(*attempt["steps"])
        job = f"job {attempt['job']}" if attempt["job"] else ""
        # The reason of a good ending repeats it, and that of a crash is in its own lines.
        told = attempt["code"] == 0 or attempt is explained or not attempt["reason"]
        why = "" if told else f": {attempt['reason']}"
        lines.append(f"{attempt['number']:<4} {steps:<16} {job:<12} {attempt['ending']}{why}")
    return lines


def _crash(failed: dict[str, Any] | None) -> list[str]:
    """What is known of the newest failure."""
    if failed is None:
        return []
    crash = failed["crash"]
    return [f"attempt {failed['number']}: {crash['summary']}", *([crash["path"]] if crash["path"] else [])]


def _runs_of_sweep(folder: Path) -> list[Path]:
    """Return the runs in a directory that is none itself."""
    from slurm.status import find_runs, is_run

    return [] if is_run(folder) else find_runs(folder)


def _all_runs(below: Path | None, *, as_json: bool) -> None:
    from slurm.queue import QueueError
    from slurm.status import find_runs, queued_runs
    from slurm.status import status as ask

    found, problem = find_runs(Path("runs") if below is None else below), None
    if below is None:
        try:
            found += [path for path in queued_runs() if path not in {each.resolve() for each in found}]
        except QueueError as error:
            problem = f"the queue did not answer: {error}"
    # One that does not answer is asked once, not for every run.
    answers = [ask(path, queue_answers=problem is None) for path in found]
    if as_json:
        print(json.dumps({"runs": answers, "problem": problem}))
        return
    for answer in answers:
        print(_one_line(answer, max(len(each["run"]) for each in answers)))
    if problem is not None:
        print(f"warning: {problem}")
    if not answers:
        print("no runs below ./runs, and none of yours in the queue")


def _one_line(answer: dict[str, Any], width: int) -> str:
    step = "no step yet" if answer["step"] is None else f"step {answer['step']:,}"
    of = f"/{answer['steps']:,}" if answer["step"] is not None and answer["steps"] else ""
    loss = f"  loss {float(answer['loss']):.4f}" if answer["loss"] is not None else ""
    job = next((f"  job {job['id']} {job['state'].lower()}" for job in answer["jobs"]), "")
    return f"{answer['run']:<{width}}  {answer['state']:<11} {step}{of}{loss}{job}"
