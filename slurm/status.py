"""How a run stands: what its directory says, and what the queue adds. Without SLURM the directory says most of it.

Imports no torch: a login node answers in less than half a second.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from monitoring.goodput import useful_seconds
from monitoring.runlog import Record, attempts, read_events, read_outcome
from monitoring.runview import ENDINGS
from pipeline.checkpoints.manifest import MANIFEST, list_checkpoints
from slurm import joblog, queue
from slurm.quarantine import quarantined
from slurm.request import JobRequest, RequestError

_WORDS = {0: "finished", 10: "stopped", 11: "diverged", 12: "refused"}
_AT_WORK = {"RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SUSPENDED"}

SILENT_SECONDS = 60.0
"""Age of its last sign of life at which an attempt is taken for dead, where no queue knows better."""

_PATIENCE = 5.0
_TAIL_BYTES = 65536
_DEFAULT_QUARANTINE_HOURS = 72.0
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class StatusError(ValueError):
    """There is no run where one was looked for."""


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
        pace; `goodput`: seconds of the steps that the run stands on / seconds of all launches; `checkpoint`,
        `quarantine`, `over` (code and reason, None while the chain lives), `cancelled`, `warnings`.

    Raises:
        StatusError: there is no run in that directory.
    """
    now = time.time() if now is None else now
    if not is_run(run_dir):
        raise StatusError(f"{run_dir}: is no run directory; name one that `rookery submit` or `rookery train` wrote")
    records = joblog.read(run_dir)
    chain = joblog.current_chain(records)
    warnings: list[str] = []
    request = _request(run_dir, warnings)
    jobs = _jobs(run_dir, chain, patience if queue_answers else None, warnings)
    events = read_events(run_dir)
    lives = _attempts(run_dir, records, events, jobs, now)
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
    answer = {
        "site": next((each.get("site") for each in reversed(chain) if _is(each, "submitted")), None),
        "nodes": None if request is None else request.nodes,
        "chain": _chain(chain),
        "jobs": jobs,
        "attempts": lives,
        **_progress(run_dir, events, lives),
        "goodput": _goodput(run_dir, records, lives, now),
        "checkpoint": _checkpoint(run_dir, now),
        "quarantine": quarantined(run_dir, hours, now),
        "over": over,
        "cancelled": any(_is(each, "cancelled") for each in chain),
        "warnings": warnings,
    }
    return {"run": str(run_dir), "state": _state(answer), **answer}


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run, started or only submitted."""
    return (path / "run.yaml").is_file() or (path / "attempts").is_dir()


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


def _attempts(
    run_dir: Path, records: Sequence[Record], events: Sequence[Record], jobs: Sequence[dict[str, Any]], now: float
) -> list[dict[str, Any]]:
    numbers = attempts(run_dir)
    launches = {each.get("attempts", -1) + 1: each for each in records if _is(each, "launched")}
    starts = {each.get("attempt"): each.get("time") for each in reversed(events) if each["kind"] == "start"}
    running = {job["id"] for job in jobs if job["state"] in ("RUNNING", "UNKNOWN")}
    gone = {job["id"] for job in jobs if job["state"] == "GONE" or job["state"] in queue.ENDED}
    lives = []
    for number in numbers:
        launch = launches.get(number, {})
        outcome = read_outcome(run_dir, number)
        first, last = _ends(run_dir / "metrics" / f"{number:04d}.jsonl")
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
            }
        )
    return lives


def _last_sign(run_dir: Path, number: int, last: Record | None) -> float | None:
    """Return when an attempt was last heard of: its heartbeat or its newest step."""
    times = [] if last is None else [last.get("time")]
    with suppress(OSError, ValueError, AttributeError):
        times.append(json.loads((run_dir / "attempts" / f"{number:04d}" / "heartbeat.json").read_bytes()).get("time"))
    return max((time_ for time_ in times if isinstance(time_, int | float)), default=None)


def _ends(path: Path) -> tuple[Record | None, Record | None]:
    """Return the first and the last step record of an attempt; of a long file only its two ends are read."""
    with suppress(OSError), path.open("rb") as file:
        first = next(_steps([file.readline()]), None)
        return first, next(_steps(reversed(_tail(path))), None)
    return None, None


def _tail(path: Path) -> list[bytes]:
    """Return the complete lines among the last of a file."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().split(b"\n")
    return lines[1 if size > _TAIL_BYTES else 0 : -1]


def _steps(lines: Any) -> Iterator[Record]:
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def _progress(run_dir: Path, events: Sequence[Record], lives: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where the run stands: the newest record, unless a later attempt has gone back behind it."""
    total = (_read_yaml(run_dir / "run.yaml").get("train") or {}).get("steps")
    answer = dict.fromkeys(("step", "tokens", "loss", "tokens_per_second", "seconds_left"))
    answer["steps"] = total
    last = next((life["number"] for life in reversed(lives) if life["steps"] is not None), None)
    if last is None:
        return answer
    recent = list(_steps(_tail(run_dir / "metrics" / f"{last:04d}.jsonl")))
    newest = recent[-1]
    answer |= {key: newest.get(key) for key in ("step", "tokens", "loss")}
    seconds = [each["seconds"] for each in recent if isinstance(each.get("seconds"), int | float)]
    # Steps differ in depth, and so in time, by a factor of ten: one of them says little.
    if seconds and sum(seconds) > 0.0:
        trained = [each["seconds"] * each["tokens_per_second"] for each in recent if each.get("tokens_per_second")]
        answer["tokens_per_second"] = sum(trained) / sum(seconds)
        if isinstance(total, int):
            answer["seconds_left"] = (total - newest["step"]) * sum(seconds) / len(seconds)
    began = [each for each in events if each["kind"] == "start" and each.get("attempt", 0) > last]
    if began and began[-1].get("step", newest["step"]) < newest["step"]:
        answer |= {"step": began[-1]["step"], "tokens": None, "loss": None}
    return answer


def _goodput(run_dir: Path, records: Sequence[Record], lives: Sequence[dict[str, Any]], now: float) -> float | None:
    """Return the part of the seconds of all launches that went into steps which the run still stands on."""
    ended = {(each.get("job"), each.get("launch")): each["time"] for each in records if _is(each, "ended")}
    by_attempt = {life["number"]: life for life in lives}
    spent, counted = 0.0, set()
    for each in records:
        if not _is(each, "launched"):
            continue
        life = by_attempt.get(each.get("attempts", -1) + 1, {})
        counted.add(life.get("number"))
        end = ended.get((each.get("job"), each.get("launch")))
        if end is None:  # it runs, or died with its node
            end = life.get("end") or (now if life.get("ending") == "running" else each["time"])
        spent += max(0.0, end - each["time"])
    for life in lives:  # started by hand
        if life["number"] not in counted and life["start"] is not None:
            spent += max(0.0, (life["end"] or now) - life["start"])
    return min(1.0, useful_seconds(run_dir) / spent) if spent > 0.0 else None


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
