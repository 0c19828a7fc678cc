"""Why an attempt ended that did not end well: which rank and node, what it said last, where everyone stood.

It is put together from what lies on the disk (outcome, failures, reports of a hang, heartbeats, the output of ranks
and launcher, what the link noted), so that it can be written by whoever is left: the process that fails, the link of
the job, the next start. Later writers know more, and overwrite.
"""

from __future__ import annotations

import time as clock
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from monitoring.crashes.culprit import LOG_BYTES, Case, Verdict, failure_text, judge, read_json
from monitoring.crashes.last_words import of_rank, tail
from monitoring.reading.step_records import read_ends
from monitoring.runlog import Record, attempts, write_atomic

FILE = "crash.json"
"""In the directory of an attempt."""

LINES = 100
_CLEAN = (0, 10)
_STACK_CHARACTERS = 32 << 10
_MOST_STACKS = 16
_SUMMARY_CHARACTERS = 400


def crash_report(run_dir: Path, attempt: int) -> Record | None:
    """Return what is known of the failure of an attempt that has ended; None if it ended well (0, 10).

    Returns:
        `attempt`; `summary`: one line; `class`: exception, killed, fatal signal, out of memory, hang, node lost,
        unhealthy node, diverged, refused, cancelled or unknown; `kind`: the exception's or signal's name; `rank`,
        `host`, `step` and `phase` of the rank that failed first, without phase where its last heartbeat is older than
        the newest step; `evidence`: what speaks for that, in words;
        `exit_code` of the outcome and `status` of the launcher; `job`, `launch`, `nodes`; `log`: a file, relative to
        the run directory, and `lines`, its last 100 or those of the rank; `stacks`: a list of {source, rank, text};
        `last_step`: newest step in the run log; `last_steps`: rank -> {host, step, phase, state, time}, by the nodes'
        heartbeats; `start`, `end` (unix seconds). What is not known is None, or empty.

    Raises:
        RunLogError: there is no such run directory.
    """
    case = Case.read(run_dir, attempt)
    if case.outcome.get("exit_code") in _CLEAN:
        return None
    found, launch = judge(case), case.launch
    host = found.host or case.host(found.rank)
    last_steps = _last_steps(case)
    own = last_steps.get(str(found.rank), {})
    step = own.get("step") if found.step is None else found.step
    phase = own.get("phase") if found.phase is None else found.phase
    log = found.log or case.log_of(found.rank)
    last = next(reversed(read_ends(run_dir / "metrics" / f"{attempt:04d}.jsonl", LOG_BYTES).newest), {})
    stale = None
    if found.step is None and isinstance(step, int) and step <= last.get("step", 0):  # it was done after the heartbeat
        stale, step, phase = f"{phase} of step {step}" if phase else f"step {step}", last["step"], None
    times = [case.outcome.get("time"), None if launch is None else launch.ended]
    times += [max([_seconds(last.get("time")), *(each["time"] for each in last_steps.values())])]
    report = {
        "class": found.name,
        "kind": found.kind,
        "rank": found.rank,
        "host": host,
        "step": step,
        "phase": phase,
        "evidence": found.evidence,
        "exit_code": case.outcome.get("exit_code"),
        "status": None if launch is None else launch.status,
        "job": None if launch is None else launch.job,
        "launch": None if launch is None else launch.number,
        "nodes": case.hosts if launch is None else launch.nodes,
        "log": log,
        "lines": [] if log is None else of_rank(tail(run_dir / log, LOG_BYTES), found.rank)[-LINES:],
        "stacks": _stacks(case, found),
        "last_step": last.get("step"),
        "last_steps": last_steps,
        "start": None if launch is None else launch.began,
        "end": next((time for time in times if time), None),
    }
    return {"attempt": attempt, "summary": _summary(found, host, _place(step, phase, stale))} | report


def write_crash_report(run_dir: Path, attempt: int) -> Path | None:
    """Write the report of an attempt that has ended; return where, None if it ended well or that is not possible.

    It never raises: whoever calls it is about to report something worse.
    """
    path = run_dir / "attempts" / f"{attempt:04d}" / FILE
    with suppress(Exception):
        report = crash_report(run_dir, attempt)
        if report is not None:
            write_atomic(path, orjson.dumps(report | {"written": clock.time()}, option=orjson.OPT_NON_STR_KEYS))
            return path
    return None


def report_crashes(run_dir: Path, before: int) -> None:
    """Write the reports that are missing of attempts before number `before`, none of which runs any more."""
    for attempt in attempts(run_dir):
        if attempt < before and not (run_dir / "attempts" / f"{attempt:04d}" / FILE).exists():
            write_crash_report(run_dir, attempt)


def read_crash_report(run_dir: Path, attempt: int) -> Record | None:
    """Return the report that was written of an attempt, None if there is none that can be read."""
    return read_json(run_dir / "attempts" / f"{attempt:04d}" / FILE) or None


def _place(step: int | None, phase: str | None, stale: str | None) -> str | None:
    if stale is not None:
        return f"after step {step} (last heartbeat: {stale})"
    return (f"{phase} of step {step}" if phase else f"step {step}") if step is not None else phase


def _summary(found: Verdict, host: str | None, where: str | None) -> str:
    who = f"rank {found.rank}" + (f" on {host}" if host else "") if found.rank is not None else host
    place = ", ".join(part for part in (who, where) if part)
    if found.name == "unknown":
        reason = found.reason or "ended without a word: killed, or its node died"
        text = f"unknown: {reason}" + (f"; last seen: {place}" if place else "")
    elif found.reason:
        prefix = "" if who is None or str(who) in found.reason else f"{who}: "
        text = f"{found.name}: {prefix}{found.reason}"
    else:
        text = f"{found.name}{f' ({found.kind})' if found.kind else ''}" + (f": {place}" if place else "")
    text = " ".join(text.split())
    return text if len(text) <= _SUMMARY_CHARACTERS else f"{text[: _SUMMARY_CHARACTERS - 3]}..."


def _stacks(case: Case, found: Verdict) -> list[Record]:
    """Return the stacks that there are, those of the rank that failed first before the others."""
    stacks: list[Record] = []
    if found.text:
        stacks.append({"source": found.log, "rank": found.rank, "text": "\n".join(found.text)})
    stacks += [
        {"source": failure["source"], "rank": failure.get("rank"), "text": failure_text(failure)}
        for failure in sorted(case.failures, key=lambda each: each.get("rank") != found.rank)[:_MOST_STACKS]
    ]
    dumps = {int(path.stem.rpartition("-")[2]): path for path in sorted((case.folder / "hang").glob("rank-*.txt"))}
    for rank in sorted(dumps, key=lambda rank: rank != found.rank)[:_MOST_STACKS]:
        text = "\n".join(tail(dumps[rank], _STACK_CHARACTERS))
        stacks.append({"source": f"hang/{dumps[rank].name}", "rank": rank, "text": text})
    return [each | {"text": each["text"][-_STACK_CHARACTERS:]} for each in stacks]


def _last_steps(case: Case) -> dict[str, Record]:
    """Return rank -> where it stood when it was last heard of, by the heartbeats of the nodes or the end of a hang."""
    steps: dict[str, Record] = {}
    for path in sorted((case.folder / "nodes").glob("[!.]*.json")):
        beat = read_json(path)
        ranks = beat.get("ranks")
        for rank, standing in ranks.items() if isinstance(ranks, dict) else ():
            if isinstance(standing, dict):
                steps[rank] = {"host": beat.get("host"), "time": _seconds(beat.get("time"))} | standing
    beat = read_json(case.folder / "heartbeat.json")
    if beat and "0" not in steps:
        standing = {key: beat.get(key) for key in ("step", "phase")}
        steps["0"] = {"host": case.host(0), "time": _seconds(beat.get("time")), "state": None} | standing
    records = case.hang.get("ranks")
    for each in records if isinstance(records, list) else ():
        if isinstance(each, dict):
            standing = {key: each.get(key) for key in ("host", "step", "phase", "state")}
            steps[str(each.get("rank"))] = standing | {"time": _seconds(case.hang.get("time"))}
    return dict(sorted(steps.items(), key=lambda item: int(item[0]) if item[0].isdecimal() else -1))


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
