"""How a run stands: what its directory says, and what the queue adds. Without SLURM the directory says most of it.

Imports no torch: a login node answers in less than half a second.
"""

from __future__ import annotations

import json
import operator
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from monitoring.crashes.report import FILE as CRASH
from monitoring.crashes.report import crash_report, read_crash_report
from monitoring.goodput import SILENT_SECONDS, Ledger, LedgerReader
from monitoring.reading.run_config import beyond_plan, planned_steps, read_config, require_run
from monitoring.reading.runview import ENDINGS
from monitoring.reading.runview import number as number_of
from monitoring.reading.step_records import Ends, read_ends
from monitoring.runlog import Record, attempts, read_events, read_outcome
from monitoring.standing import begun
from pipeline.checkpoints.manifest import MANIFEST, list_checkpoints
from slurm import joblog, queue
from slurm.quarantine import quarantined
from slurm.request import JobRequest, RequestError

_WORDS = {0: "finished", 10: "stopped", 11: "diverged", 12: "refused"}
_AT_WORK = {"RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SUSPENDED"}

_PATIENCE = 5.0
_LEDGER_BYTES = 512 << 20  # read in some seconds, and enough for half a million steps
_DEFAULT_QUARANTINE_HOURS = 72.0
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def status(
    run_dir: Path, now: float | None = None, *, patience: float = _PATIENCE, queue_answers: bool = True
) -> dict[str, Any]:
    """Return how a run stands, ready for JSON; what is not known is None.

    Args:
        run_dir: the run directory.
        now: unix seconds to look from; None for this moment.
        patience: seconds to ask a queue that does not answer.
        queue_answers: False if it is known not to, so that it is not asked.

    Returns:
        `run`, `site`, `state` (one word); `chain` (kind, links, used); `jobs` in the order in which they run;
        `attempts`; `step`, `steps`, `tokens`, `loss`, `tokens_per_second`, `seconds_left` of training at the recent
        pace; `ledger`: seconds of its time by what they went into, `total` and `share`, the goodput
        (`monitoring.goodput`); `checkpoint`, `quarantine`, `over` (code and reason, None while the chain lives),
        `cancelled`, `warnings`. Attempts that failed have a `crash`: class, kind, summary, rank, host, path of the
        report.

    Raises:
        RunLogError: there is no run in that directory.
    """
    now = time.time() if now is None else now
    require_run(run_dir)
    records = joblog.read(run_dir)
    chain = joblog.current_chain(records)
    warnings: list[str] = []
    request = _request(run_dir, warnings)
    jobs = _jobs(run_dir, chain, patience if queue_answers else None, warnings)
    events = read_events(run_dir)
    ends = {number: read_ends(run_dir / "metrics" / f"{number:04d}.jsonl") for number in attempts(run_dir)}
    lives = _attempts(run_dir, ends, records, events, jobs, now)
    hours = _DEFAULT_QUARANTINE_HOURS if request is None else request.quarantine_hours
    over = next(({"code": each.get("code"), "reason": each.get("reason")} for each in chain if _is(each, "over")), None)
    # What a link says in passing, of the current chain: files that were not staged, an evaluation that was not sent.
    warnings += [
        f"job {each.get('job')}: not staged: {each.get('reason')}" for each in chain if _is(each, "not_staged")
    ]
    warnings += [
        f"step {each.get('step')} is not evaluated: {each['problem']}"
        for each in chain
        if _is(each, "evaluation") and each.get("problem")
    ]
    progress, ledger = _progress(run_dir, ends, events, lives, warnings), _ledger(run_dir, lives, now, warnings)
    warnings += [f"metrics/{attempt:04d}.jsonl: {end.problem}" for attempt, end in ends.items() if end.problem]
    answer = {
        "site": next((each.get("site") for each in reversed(chain) if _is(each, "submitted")), None),
        "nodes": None if request is None else request.nodes,
        "chain": _chain(chain),
        "jobs": jobs,
        "attempts": lives,
        **progress,
        "ledger": ledger.to_dict(),
        "checkpoint": _checkpoint(run_dir, now),
        "quarantine": quarantined(run_dir, hours, now),
        "over": over,
        "cancelled": any(_is(each, "cancelled") for each in chain),
        "warnings": warnings,
    }
    return {"run": str(run_dir), "state": _state(answer), **answer}


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run, started or only submitted."""
    with suppress(OSError):
        return (path / "run.yaml").is_file() or (path / "attempts").is_dir()
    return False


def find_runs(below: Path) -> list[Path]:
    """Return the runs in `below` and, for sweeps, in its directories; sorted."""
    found = []
    for path in _directories(below):
        found += [path] if is_run(path) else [inner for inner in _directories(path) if is_run(inner)]
    return sorted(found)


def queued_runs(patience: float = _PATIENCE) -> list[Path]:
    """Return the run directories of this person's jobs in the queue.

    Raises:
        QueueError: the queue does not answer.
    """
    comments = queue.own_jobs(patience=patience).values() if queue.available() else ()
    return sorted({Path(comment) for comment in comments if comment.startswith("/") and is_run(Path(comment))})


def _directories(path: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from (entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _is(record: Record, kind: str) -> bool:
    return bool(record["kind"] == kind)


def _request(run_dir: Path, warnings: list[str]) -> JobRequest | None:
    try:
        return JobRequest.read(run_dir)
    except RequestError as error:
        if (run_dir / "job.json").exists():
            warnings.append(str(error))
        return None


def _read_yaml(path: Path) -> dict[str, Any]:
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - C's safe loader
        return tree if isinstance(tree, dict) else {}
    return {}


def is_local(run_dir: Path) -> bool:
    """Whether the jobs of a run are processes of a machine, and not of SLURM."""
    return _read_yaml(run_dir / "site.yaml").get("scheduler") == "local"


def _chain(chain: Sequence[Record]) -> dict[str, Any] | None:
    submitted = [each for each in chain if _is(each, "submitted")]
    if not submitted:
        return None
    newest = submitted[-1]
    begun = {(each.get("job"), each.get("restart", 0)) for each in chain if _is(each, "began")}
    return {"kind": newest.get("chain"), "links": newest.get("links"), "used": len(begun)}


def unfinished_jobs(chain: Sequence[Record]) -> list[str]:
    """Return the jobs of a chain that may still wait or run, in order: not those after which another one began."""
    ids = list(dict.fromkeys(id_ for each in chain if _is(each, "submitted") for id_ in each.get("jobs", [])))
    begun = list(dict.fromkeys(each.get("job") for each in chain if _is(each, "began")))
    past = {id_ for id_ in begun if id_ != begun[-1]}
    return [str(id_) for id_ in ids if id_ not in past]


def _jobs(run_dir: Path, chain: Sequence[Record], patience: float | None, warnings: list[str]) -> list[dict[str, Any]]:
    ids = unfinished_jobs(chain)
    known: dict[str, queue.QueuedJob] = {}
    asked = False
    if ids and is_local(run_dir):
        host = next((each.get("host") for each in reversed(chain) if _is(each, "submitted")), None)
        asked = host in (None, socket.gethostname())
        known = queue.local_jobs(ids) if asked else {}
        if not asked:
            warnings.append(f"its job is a process of {host}; ask there whether it runs")
    elif ids and patience is not None and queue.available():
        try:
            known = queue.job_states(ids, patience=patience)
            asked = True
        except queue.QueueError as error:
            warnings.append(f"the queue did not answer: {error}")
    elif ids and patience is not None:
        warnings.append("there is no SLURM here to ask; this is what the run directory says")
    return [_job(id_, known.get(id_), asked=asked) for id_ in ids]


def _job(id_: str, job: queue.QueuedJob | None, *, asked: bool) -> dict[str, Any]:
    if job is None:  # the queue forgets a job some minutes after its end
        return {"id": id_, "state": "GONE" if asked else "UNKNOWN"}
    waits = job.state == "PENDING"
    return {
        "id": id_,
        "state": job.state,
        "reason": job.reason,
        "expected_start": job.start if waits else None,
        "start": None if waits else job.start,
        "end": job.end if job.over else None,
        "time_left_seconds": job.time_left_seconds,
        "nodes": job.nodes,
        "node_list": job.node_list,
        "exit_code": job.exit_code,
        "restarts": job.restarts,
    }


def _ledger(run_dir: Path, lives: Sequence[dict[str, Any]], now: float, warnings: list[str]) -> Ledger:
    """Return where the time went, and say what is odd about the log that it was read from; nothing of a huge one."""
    reader = LedgerReader(run_dir)
    found = reader.read(now, running=_runs(lives), budget=_LEDGER_BYTES)
    warnings += reader.warnings()
    if reader.behind:
        warnings.append(
            f"a log of over {_LEDGER_BYTES >> 20} MB: no goodput, and warnings of its first part only;"
            f" `rookery report {run_dir}` reads all of it"
        )
        return Ledger()
    return found


def _attempts(
    run_dir: Path,
    ends: Mapping[int, Ends],
    records: Sequence[Record],
    events: Sequence[Record],
    jobs: Sequence[dict[str, Any]],
    now: float,
) -> list[dict[str, Any]]:
    numbers = list(ends)
    launches = {each.get("attempts", -1) + 1: each for each in records if _is(each, "launched")}
    starts = {each.get("attempt"): each.get("time") for each in reversed(events) if each["kind"] == "start"}
    running = {job["id"] for job in jobs if job["state"] in ("RUNNING", "UNKNOWN")}
    gone = {job["id"] for job in jobs if job["state"] == "GONE" or job["state"] in queue.ENDED}
    lives = []
    for number in numbers:
        launch = launches.get(number, {})
        outcome = read_outcome(run_dir, number)
        first, last = ends[number].first, next(reversed(ends[number].newest), None)
        sign = _last_sign(run_dir, number, last)
        # Without a queue that knows better the heartbeat is believed.
        fresh = sign is not None and now - sign < SILENT_SECONDS and launch.get("job") not in gone
        alive = outcome is None and number == numbers[-1] and (fresh or launch.get("job") in running)
        code = None if outcome is None else outcome.get("exit_code")
        known = ENDINGS.get(code, f"failed (exit {code})") if isinstance(code, int) else None
        lives.append(
            {
                "number": number,
                "steps": None if first is None or last is None else [first["step"], last["step"]],
                "ending": known or ("running" if alive else "ended without a word: killed, or its node died"),
                "code": code,
                "reason": None if outcome is None else outcome.get("reason"),
                "job": launch.get("job"),
                "nodes": launch.get("nodes", []),
                "log": launch.get("log"),
                "start": launch.get("time") or starts.get(number),
                "end": None if alive else (outcome or {}).get("time") or sign,
                "crash": None if alive else _crash(run_dir, number, code, newest=number == numbers[-1]),
            }
        )
    return lives


def _last_sign(run_dir: Path, number: int, last: Record | None) -> float | None:
    """Return when an attempt was last heard of: its heartbeat or its newest step, before both when it began."""
    times = [] if last is None else [last.get("time")]
    with suppress(OSError, ValueError, AttributeError):
        times.append(json.loads((run_dir / "attempts" / f"{number:04d}" / "heartbeat.json").read_bytes()).get("time"))
    return max((time_ for time_ in times if isinstance(time_, int | float)), default=begun(run_dir, number))


def _progress(
    run_dir: Path,
    ends: Mapping[int, Ends],
    events: Sequence[Record],
    lives: Sequence[dict[str, Any]],
    warnings: list[str],
) -> dict[str, Any]:
    """Where the run stands: the newest record, unless a later attempt has gone back behind it."""
    config, problem = read_config(run_dir)
    warnings += [] if problem is None else [problem]
    total = planned_steps(config)
    answer = dict.fromkeys(("step", "tokens", "loss", "tokens_per_second", "seconds_left"))
    answer["steps"] = total
    last = next((life["number"] for life in reversed(lives) if life["steps"] is not None), None)
    if last is None:
        return answer
    recent = ends[last].newest
    newest = recent[-1]
    answer |= {"step": newest["step"], "tokens": newest.get("tokens"), "loss": _loss(newest)}
    warnings += beyond_plan(newest["step"], total)
    recent = [each for each in recent if number_of(each, "seconds") is not None]
    seconds = [max(0.0, float(each["seconds"])) for each in recent]
    # Steps differ in depth, and so in time, by a factor of ten: one of them says little.
    if seconds and sum(seconds) > 0.0:
        rates = [number_of(each, "tokens_per_second") or 0.0 for each in recent]
        answer["tokens_per_second"] = sum(map(operator.mul, seconds, rates)) / sum(seconds)
        if total is not None:
            answer["seconds_left"] = max(0, total - newest["step"]) * sum(seconds) / len(seconds)
    began = [each for each in events if each["kind"] == "start" and each.get("attempt", 0) > last]
    if began and began[-1].get("step", newest["step"]) < newest["step"]:
        answer |= {"step": began[-1]["step"], "tokens": None, "loss": None}
    return answer


def _loss(record: Record) -> float | str | None:
    """Return the loss of a step; as the run log spells it where it is not finite."""
    loss = record.get("loss")
    return loss if loss in ("nan", "inf", "-inf") else number_of(record, "loss")


def _runs(lives: Sequence[dict[str, Any]]) -> bool:
    return bool(lives) and lives[-1]["ending"] == "running"


def _crash(run_dir: Path, attempt: int, code: Any, *, newest: bool) -> dict[str, Any] | None:
    """Return the gist of the report of a failed attempt; before the next start it may be that nobody has written it."""
    if code in (0, 10):
        return None
    report = read_crash_report(run_dir, attempt)
    path = None if report is None else str(run_dir / "attempts" / f"{attempt:04d}" / CRASH)
    report = crash_report(run_dir, attempt) if report is None and newest else report
    keys = ("class", "kind", "summary", "rank", "host")
    return None if report is None else {**{key: report.get(key) for key in keys}, "path": path}


def _checkpoint(run_dir: Path, now: float) -> dict[str, Any] | None:
    """Return the newest checkpoint on the shared file system; the nodes may hold a newer one."""
    for directory in reversed(list_checkpoints(run_dir)):
        with suppress(OSError):
            age = now - (directory / MANIFEST).stat().st_mtime
            return {"step": int(directory.name.removeprefix("step-")), "age_seconds": max(0.0, age)}
    return None


def _state(answer: dict[str, Any]) -> str:
    """Return one word for the whole run."""
    states = {job["state"] for job in answer["jobs"]}
    newest: dict[str, Any] = answer["attempts"][-1] if answer["attempts"] else {"ending": "", "code": None}
    word = _WORDS.get(newest["code"], "failed")
    if newest["code"] is None:
        word = "ended" if answer["attempts"] else "not started"
    if answer["over"] is not None:
        word = _WORDS.get(answer["over"]["code"], "failed")
    elif states & _AT_WORK or newest["ending"] == "running":
        return "cancelling" if answer["cancelled"] else "running"
    elif states & {"PENDING", "REQUEUED"}:
        word = "waiting"
    elif "UNKNOWN" in states and word != "finished":
        word = "unknown"
    return "cancelled" if answer["cancelled"] and word != "finished" else word
