"""What a chain of jobs does next, decided from what it wrote down: pure functions, no queue and no clock."""

from __future__ import annotations

import signal
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from monitoring.runlog import Record
from pipeline.errors import ExitCode
from slurm.request import JobRequest

GAVE_UP = 1
"""Code of a chain that ended itself because its launches get nowhere."""
_FINAL = (ExitCode.FINISHED, ExitCode.DIVERGED, ExitCode.BAD_INPUT)
_EARLY_SIGNAL_SECONDS = 60.0  # SLURM may send the warning signal up to a minute before it is due
_WHOLE = 0.95  # of its time limit: a job that was there for so long was ended by the limit
_SECONDS_OF_A_SUBMISSION = 60.0  # of one job; whoever submits a chain may be gone
_NODES_SHOWN = 4


@dataclass(frozen=True)
class Verdict:
    """How a launch of the ranks ended.

    Attributes:
        code: of the contract of exit codes; None for a crash.
        reason: why, in words.
        hosts: nodes that it blames.
    """

    code: int | None
    reason: str
    hosts: list[str] = field(default_factory=list)


class Move(StrEnum):
    """How a chain goes on after a link."""

    AGAIN = "again"
    """In the same process: at a site without a queue."""
    REQUEUE = "requeue"
    LEAVE = "leave"
    """The next link waits in the queue already."""
    SUBMIT = "submit"
    """No link is left in the queue: crashes have used them up before their time."""


def judge(status: int | None, outcome: Record | None, refusal: Record | None, *, began: bool) -> Verdict:
    """Return how a launch ended.

    The exit status is the weakest witness: a rank that leaves first gets the others killed, and `srun` returns 0 for
    a step that was aborted.

    Args:
        status: exit status of the launcher, negative or above 128 for a signal; None if nobody waited for it.
        outcome: what the launch's attempt says in its outcome.json, None if it left none.
        refusal: what ranks that began no attempt left: a code and why. None if they did not.
        began: whether there is an attempt of this launch.
    """
    if outcome is not None:
        code, reason = outcome.get("exit_code"), str(outcome.get("reason", "no reason given"))
        if code in [int(known) for known in ExitCode]:
            return Verdict(int(code), reason, [str(host) for host in outcome.get("hosts", [])])
        return Verdict(None, reason)
    if refusal is not None and not began and refusal.get("code") in (ExitCode.FINISHED, ExitCode.BAD_INPUT):
        return Verdict(int(refusal["code"]), str(refusal.get("reason", "no reason given")))
    if status == ExitCode.BAD_INPUT and not began:
        return Verdict(status, "bad configuration or input, nothing was started; the step's log says what")
    where = "its attempt left no outcome" if began else "no attempt had begun"
    return Verdict(None, f"{_words(status)}; {where}")


def _words(status: int | None) -> str:
    if status is None:
        return "the job ended without a word"
    number = -status if status < 0 else status - 128
    with suppress(ValueError):
        return f"the ranks were ended by {signal.Signals(number).name}"
    return f"the launcher of the ranks ended with status {status}"


def over(records: Sequence[Record], newest_step: int | None, request: JobRequest) -> tuple[int, str] | None:
    """Return the code with which a chain is over, and why; None if it goes on.

    A clean stop (10), an unhealthy node (13) and a crash go on, as long as links are left and not too many launches in
    a row made no newer checkpoint.

    Args:
        records: of the current chain.
        newest_step: step of the run's newest checkpoint, None if there is none.
        request: of the run.
    """
    for record in records:
        if record["kind"] == "over":
            return int(record["code"]), str(record["reason"])
    ended = _last(records, "ended")
    # Input that was good enough for an attempt is not bad by itself: a file system may stumble, or a network card die.
    once_good = any(record["kind"] == "ended" and record.get("attempt") is not None for record in records)
    if ended is not None and ended["code"] in _FINAL and not (ended["code"] == ExitCode.BAD_INPUT and once_good):
        return int(ended["code"]), str(ended["reason"])
    cancelled = _last(records, "cancelled")
    if cancelled is not None:
        return int(ExitCode.STOPPED), f"cancelled by {cancelled.get('by', 'a person')}"
    vain = launches_in_vain(records, newest_step)
    if vain >= request.max_restarts:
        there = "there is no checkpoint" if newest_step is None else f"the newest is still that of step {newest_step}"
        last = "" if ended is None else f"; the last one: {ended['reason']}"
        reason = f"{vain} launches in a row made no newer checkpoint ({there}){last}"
        return GAVE_UP, f"{reason}; mend that and submit again"
    if used_links(records, request) >= request.links:
        return int(ExitCode.STOPPED), "its links are used up; submit again to go on from the newest checkpoint"
    return None


def launches_in_vain(records: Sequence[Record], newest_step: int | None) -> int:
    """Return how many launches in a row, up to the last one, left no checkpoint newer than the one they began with.

    A link that came to no launch counts as one.
    """
    starts: list[int | None] = []
    going: list[int | None] = []  # what the link or launch that has not ended began with
    for record in records:
        if record["kind"] == "began":
            starts += going  # that link's job died before it came to a launch
        if record["kind"] in ("began", "launched"):
            going = [record.get("checkpoint")]
        if record["kind"] == "ended":
            starts += going
            going = []
    in_vain = 0
    for start in reversed(starts):
        if _rank(newest_step) > _rank(start):
            break
        in_vain += 1
    return in_vain


def _rank(step: int | None) -> int:
    return -1 if step is None else step


def used_links(records: Sequence[Record], request: JobRequest) -> int:
    """Return the number of links whose time is used up: those that ended early by a crash do not count."""
    limit = request.minutes * 60.0
    stopped = min(limit / 2, limit - request.signal_seconds - _EARLY_SIGNAL_SECONDS)
    used, began = 0, None
    for place, record in enumerate(records):
        if record["kind"] == "began":
            began = record
        if record["kind"] == "ended" and began is not None and _is_last_of_link(records[place + 1 :]):
            seconds = record["time"] - began["time"]
            used += seconds >= (stopped if record["code"] == ExitCode.STOPPED else limit * _WHOLE)
    return used


def _is_last_of_link(following: Sequence[Record]) -> bool:
    kinds = [record["kind"] for record in following if record["kind"] in ("began", "launched")]
    return not kinds or kinds[0] == "began"


def unsettled(records: Sequence[Record]) -> Record | None:
    """Return the last launch if nobody wrote down how it ended: its job died with it."""
    for record in reversed(records):
        if record["kind"] == "ended":
            return None
        if record["kind"] == "launched":
            return record
    return None


def job_before(records: Sequence[Record], job: str) -> str | None:
    """Return the job of the link that began last, None if that is the asking `job` or there is none."""
    began = _last(records, "began")
    return None if began is None or began["job"] == job else str(began["job"])


def suspects(records: Sequence[Record]) -> dict[str, str]:
    """Return node -> reason of the nodes to blame for the last launch if they are lost by now: all, if it crashed.

    Args:
        records: of the current chain, all launches settled.
    """
    launched, ended = _last(records, "launched"), _last(records, "ended")
    if launched is None or (ended is not None and ended["code"] is not None):
        return {}
    return dict.fromkeys(launched["nodes"], f"lost after job {launched['job']}")


def waiting_jobs(records: Sequence[Record], job: str) -> list[str]:
    """Return the jobs of the chain that were submitted and have not begun, in order, without the asking `job`."""
    begun = {record["job"] for record in records if record["kind"] in ("began", "yielded")} | {job}
    submitted = [id_ for record in records if record["kind"] == "submitted" for id_ in record["jobs"]]
    return [id_ for id_ in submitted if id_ not in begun]


def is_being_submitted(records: Sequence[Record], request: JobRequest, now: float) -> bool:
    """Return whether links of the chain are on their way into the queue: they are handed over one after another."""
    submitted = [record for record in records if record["kind"] == "submitted"]
    if not submitted or request.chain == "requeue":
        return False
    jobs = sum(len(record["jobs"]) for record in submitted)
    return jobs < request.links and now - submitted[-1]["time"] < _SECONDS_OF_A_SUBMISSION


def next_move(request: JobRequest, *, local: bool, waiting: bool) -> Move:
    """Return how a chain that is not over goes on after a link."""
    if local:
        return Move.AGAIN
    if request.chain == "requeue":
        return Move.REQUEUE
    return Move.LEAVE if waiting else Move.SUBMIT


def next_link(records: Sequence[Record], request: JobRequest) -> int:
    """Return the number, from 1, of the first link that is not used up."""
    return min(used_links(records, request) + 1, request.links)


def usable(allocation: Sequence[str], quarantined: Collection[str], lost: Collection[str]) -> list[str]:
    """Return the nodes of an allocation that may be used, in order."""
    return [node for node in allocation if node not in quarantined and node not in lost]


def relaunch(verdict: Verdict, lost: Collection[str], left: int, request: JobRequest, seconds_left: float) -> bool:
    """Return whether to start the ranks again in the same job: nodes are to blame, and enough others are left.

    Args:
        verdict: how the last launch ended.
        lost: nodes of that launch that are down now.
        left: number of usable nodes.
        request: of the run.
        seconds_left: until the job's time limit; less than twice the lead of the warning signal is not worth a start.
    """
    to_blame = bool(lost) if verdict.code is None else verdict.code == ExitCode.UNHEALTHY_NODE and bool(verdict.hosts)
    return to_blame and left >= request.nodes and seconds_left > 2 * request.signal_seconds


def evaluations_due(steps: Collection[int], evaluated: int | None, every: int) -> list[int]:
    """Return the steps to evaluate now: of the checkpoints after the one evaluated last, each `every`-th."""
    return sorted(step for step in steps if evaluated is None or step > evaluated)[every - 1 :: every]


def exit_status(code: int) -> int:
    """Return what a link of a chain that is over leaves to the queue, which shows FAILED where a person must look."""
    return 0 if code in (ExitCode.FINISHED, ExitCode.STOPPED) else code


def shown(nodes: Mapping[str, str] | Sequence[str]) -> str:
    """Return the first few names of nodes, and how many more there are."""
    names = list(nodes)
    more = f" and {len(names) - _NODES_SHOWN} more" if names[_NODES_SHOWN:] else ""
    return ", ".join(names[:_NODES_SHOWN]) + more


def _last(records: Sequence[Record], kind: str) -> Record | None:
    return next((record for record in reversed(records) if record["kind"] == kind), None)
