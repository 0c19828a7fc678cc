"""The jobs of a run and what they launched, as `jobs.jsonl` tells; a run that was started by hand has none."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monitoring.runlog import JsonlFollower, Record

FILE = "jobs.jsonl"


@dataclass(kw_only=True)
class Launch:
    """One start of the ranks by a job.

    Attributes:
        job: its id.
        number: of the launch within the job, None if unknown.
        began: when the ranks were started (unix seconds).
        ended: when they had ended, None as long as nobody has written that down.
        before: number of the newest attempt at that time.
        nodes: names of the nodes that they ran on.
        log: directory of their output, relative to the run's.
        status: exit status of the launcher, None if nobody waited for it.
        code: of docs/architecture.md; None for a crash, or before the end.
        reason: how it ended, in words.
        attempt: the attempt that it began, if the end says so.
    """

    job: str
    number: int | None
    began: float
    ended: float | None = None
    before: int
    nodes: list[str]
    log: str
    status: int | None = None
    code: int | None = None
    reason: str = ""
    attempt: int | None = None


@dataclass(kw_only=True)
class Job:
    """The time of one job, or of one of its starts if it is requeued.

    Attributes:
        id: of the job.
        began: when its link began (unix seconds).
        last: when its link last wrote something.
        launches: in order.
    """

    id: str
    began: float
    last: float
    launches: list[Launch] = field(default_factory=list)


def read_jobs(run_dir: Path) -> list[Job]:
    """Return the jobs that began, of all submissions, in order; none if the run was never submitted."""
    jobs: list[Job] = []
    for record in JsonlFollower(run_dir / FILE, "kind", str).poll():
        time = _time(record)
        if time is not None:
            _take(record, time, jobs)
    return jobs


def launch_of(jobs: list[Job], attempt: int) -> Launch | None:
    """Return the launch that began an attempt; None if that was started by hand."""
    launches = [launch for job in jobs for launch in job.launches]
    known = next((launch for launch in reversed(launches) if launch.attempt == attempt), None)
    if known is not None:
        return known
    # A launch that ended without an attempt has nothing to do with one that somebody started later.
    open_ = (launch for launch in reversed(launches) if launch.before == attempt - 1 and launch.ended is None)
    return next(open_, None)


def _take(record: Record, time: float, jobs: list[Job]) -> None:
    kind, id_ = record["kind"], record.get("job")
    if kind == "began":
        jobs.append(Job(id=str(id_), began=time, last=time))
        return
    if kind == "over" and jobs:
        id_ = jobs[-1].id
    job = next((job for job in reversed(jobs) if job.id == str(id_)), None)
    if kind == "launched":
        if job is None:
            jobs.append(job := Job(id=str(id_), began=time, last=time))
        job.launches.append(_launch(record, time))
    elif kind == "ended" and job is not None:
        _end(record, time, job)
    if job is not None and kind != "yielded":
        job.last = max(job.last, time)


def _launch(record: Record, time: float) -> Launch:
    return Launch(
        job=str(record.get("job")),
        number=_int(record.get("launch")),
        began=time,
        before=_int(record.get("attempts")) or 0,
        nodes=[str(node) for node in record.get("nodes") or []],
        log=str(record.get("log") or ""),
    )


def _end(record: Record, time: float, job: Job) -> None:
    number = _int(record.get("launch"))
    launch = next((each for each in job.launches if each.number == number and each.ended is None), None)
    if launch is not None:
        launch.ended = max(time, launch.began)  # a clock that was set back
        launch.status, launch.code = _int(record.get("status")), _int(record.get("code"))
        launch.reason, launch.attempt = str(record.get("reason") or ""), _int(record.get("attempt"))


def _time(record: Record) -> float | None:
    time: Any = record.get("time")
    known = isinstance(time, int | float) and not isinstance(time, bool) and math.isfinite(time)
    return float(time) if known else None


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
