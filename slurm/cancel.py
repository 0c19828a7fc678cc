"""Ending a run: what waits leaves the queue; what runs is told to save, and ends by itself."""

from __future__ import annotations

import getpass
import json
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from monitoring.runlog import attempts, read_outcome
from slurm import joblog, queue
from slurm.status import is_local, is_run, unfinished_jobs

# Words of the command lines of ours that have a number in a run directory; another process may have got that number.
_RANK = "train"
_LINK = "submitit.core._submit"


class CancelError(ValueError):
    """A run cannot be cancelled from here."""


def cancel(run_dir: Path, *, now: bool = False) -> dict[str, list[str]]:
    """Stop a run and its chain, with its evaluations; what runs saves first, unless `now`. It does not wait for that.

    The chain ends even if a job can not be reached: a link that finds the run cancelled starts nothing.

    Args:
        run_dir: the run directory.
        now: kill what runs; it goes on from its newest checkpoint if it is submitted again.

    Returns:
        Jobs, or processes of this machine ("pid 123"): `cancelled` before they began, `signalled` to save and end,
        `killed`, and `left`: evaluations that run and may finish.

    Raises:
        CancelError: there is no run, or it runs on another machine.
        QueueError: the queue does not answer; the run is marked all the same.
    """
    if not is_run(run_dir):
        raise CancelError(f"{run_dir}: is no run directory; name one that `rookery submit` or `rookery train` wrote")
    chain = joblog.current_chain(joblog.read(run_dir))
    ids = unfinished_jobs(chain)
    evaluations = [str(each["evaluation_job"]) for each in chain if each.get("evaluation_job")]
    if not ids:
        return _stop_processes(_ranks(run_dir), now=now)
    if not any(record["kind"] == "over" for record in chain):
        joblog.append(run_dir, "cancelled", by=f"{getpass.getuser()}@{socket.gethostname()}", now=now)
    if is_local(run_dir):
        host = next((record.get("host") for record in reversed(chain) if record["kind"] == "submitted"), None)
        if host not in (None, socket.gethostname()):
            raise CancelError(f"{run_dir}: runs on {host}; type this there")
        return _stop_local(run_dir, ids, evaluations, now=now)
    try:
        return _stop_jobs(ids, evaluations, now=now)
    except queue.QueueError as error:
        raise queue.QueueError(
            f"{run_dir}: is marked as cancelled, so that its chain ends with the job that runs now; but {error}"
        ) from error


def _stop_jobs(ids: Sequence[str], evaluations: Sequence[str], *, now: bool) -> dict[str, list[str]]:
    asked = [*ids, *evaluations]
    known = queue.job_states(asked)
    jobs = [known[id_] for id_ in asked if id_ in known and not known[id_].over]
    running = [job.id for job in jobs if job.state in ("RUNNING", "SUSPENDED")]
    others = [job.id for job in jobs if job.id not in running and job.state != "COMPLETING"]
    at_work = [id_ for id_ in running if now or id_ not in evaluations]
    # Last links first: the next would start as soon as the one before it is gone.
    queue.scancel(others[::-1])
    if now:
        queue.scancel(at_work)
        return {"cancelled": others, "signalled": [], "killed": at_work, "left": []}
    # To the ranks alone: the link in the batch script sees that the run is cancelled, and outlives them.
    queue.scancel(at_work, signal="TERM")
    left = [id_ for id_ in running if id_ not in at_work]
    return {"cancelled": others, "signalled": at_work, "killed": [], "left": left}


def _stop_local(run_dir: Path, ids: Sequence[str], evaluations: Sequence[str], *, now: bool) -> dict[str, list[str]]:
    left = list(queue.local_jobs(evaluations))
    ids, left = ([*ids, *left], []) if now else (ids, left)
    jobs = [psutil.Process(int(id_)) for id_ in queue.local_jobs(ids)]
    below = [child for job in jobs for child in _children(job)]
    if now:
        for process in [*jobs, *below]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return {"cancelled": [], "signalled": [], "killed": [str(job.pid) for job in jobs], "left": []}
    # An MPI launcher kills its ranks when it is told to end, so that the ranks are told themselves. Until there are
    # any, the link is told, which then starts none.
    ranks = [process for process in _ranks(run_dir) if process in below]
    links = [process for process in below if _LINK in _command(process)]
    _stop_processes(ranks or links, now=False)
    return {"cancelled": [], "signalled": [str(job.pid) for job in jobs], "killed": [], "left": left}


def _stop_processes(processes: Sequence[psutil.Process], *, now: bool) -> dict[str, list[str]]:
    told = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL if now else signal.SIGTERM)
            told.append(f"pid {process.pid}")
    return {"cancelled": [], "signalled": [] if now else told, "killed": told if now else [], "left": []}


def _ranks(run_dir: Path) -> list[psutil.Process]:
    """Return the ranks of the newest attempt that are processes of this machine and still run."""
    number = max(attempts(run_dir), default=None)
    if number is None or read_outcome(run_dir, number) is not None:
        return []
    path = run_dir / "attempts" / f"{number:04d}" / "environment.json"
    ranks: list[dict[str, Any]] = []
    with suppress(OSError, ValueError, KeyError, TypeError):
        ranks = list(json.loads(path.read_bytes())["ranks"])
    found = []
    for rank in ranks:
        with suppress(psutil.Error, KeyError, TypeError, ValueError):
            process = psutil.Process(int(rank["pid"]))
            # It may have been started under another host name, as a node of a test cluster is.
            same = rank["host"] in (socket.gethostname(), os.environ.get("SLURMD_NODENAME"))
            if same and _RANK in _command(process) and process.create_time() <= path.stat().st_mtime:
                found.append(process)
    return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []
