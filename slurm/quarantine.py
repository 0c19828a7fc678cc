"""Nodes that a run avoids: `quarantine.jsonl`, one line a verdict, which expires; a person may edit or remove it."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path

from monitoring.runlog import JsonlFollower
from slurm import joblog, queue

FILE = "quarantine.jsonl"
_SECONDS = 3600.0


def quarantine(run_dir: Path, node: str, reason: str, job: str) -> None:
    """Write down that a node is to be avoided, and which job found out why; a full disk is told on stderr."""
    joblog.append_line(run_dir / FILE, {"time": time.time(), "node": node, "reason": reason, "job": job})


def quarantined(run_dir: Path, hours: float, now: float) -> dict[str, str]:
    """Return node -> newest reason of the nodes to avoid at `now` (unix seconds), the newest verdict last.

    Args:
        run_dir: the run directory.
        hours: age at which a verdict expires.
        now: the time to look from.
    """
    held: dict[str, str] = {}
    for record in JsonlFollower(run_dir / FILE, "node", str).poll():
        # Without a time it is a person's line, which that person takes out again.
        if now - _time(record.get("time"), now) < hours * _SECONDS:
            held.pop(record["node"], None)
            held[record["node"]] = str(record.get("reason", ""))
    return held


def excludable(nodes: Sequence[str], partition: str | None, needed: int, also: Collection[str] = ()) -> list[str]:
    """Return which nodes a job may be kept off, in order: SLURM refuses names that it does not know.

    A job that fewer nodes are left for than it needs would wait for ever: then the first of the nodes are left out.

    Args:
        nodes: to keep off; all of them are returned if the queue does not answer.
        partition: of the job, None for the queue's own.
        needed: number of nodes that the job asks for.
        also: nodes that it is kept off in any case.
    """
    if not nodes:
        return []
    try:
        members = queue.partition_nodes(partition)
    except queue.QueueError as error:
        joblog.say(str(error))
        return list(nodes)
    known = [node for node in nodes if node in members]
    most = max(0, len(members.difference(also)) - needed)
    return known[max(0, len(known) - most) :]


def _time(value: object, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default
