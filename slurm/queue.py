"""What the queue says about jobs and nodes, and the few things that it is asked to do with them.

Everything is asked of SLURM's own programs, without its accounting storage: `squeue` first, and `sacct` only about jobs
that the controller has forgotten. A controller that is away for a moment is asked again.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.job_time import parse_time_left

PATIENCE = 10.0
"""Seconds that a controller which does not answer is asked again and again."""

ENDED = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
        *("PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
    )
)
"""States of SLURM in which a job is over."""

# A node in one of these states runs nothing; a suffix of a sign (* means that it does not answer) is taken apart.
_LOST = ("down", "drain", "fail", "not_responding", "unknown", "powered_down", "powering_down", "planned_down", "error")
AWAY = re.compile(
    r"unable to contact slurm controller|connection refused|socket timed out|zero bytes were transmitted|try again"
    r"|temporarily|timed out|transport endpoint|connection reset|standby mode|message (send|receive) failure"
    r"|unexpected message received",
    re.IGNORECASE,
)
"""What SLURM's programs say when the controller does not answer."""

_GONE = re.compile(r"invalid job id|already completing|already complete|already finished", re.IGNORECASE)
_NOT_WAITING = re.compile(_GONE.pattern + r"|no longer pending|is not pending|job is running", re.IGNORECASE)
_WAITS_AGAIN = re.compile("job is pending execution", re.IGNORECASE)
_RANGE = r"\d+(?:-\d+)?"
_NODES = rf"(?:[^,\[\]\s]|\[{_RANGE}(?:,{_RANGE})*\])+"
_JOB_FIELDS = (
    *("JobArrayID", "State", "Reason", "StartTime", "EndTime", "TimeLeft", "RestartCnt", "exit_code", "NumNodes"),
    "NodeList",
)
_SACCT_FIELDS = ("JobID", "State", "Reason", "Start", "End", "ExitCode", "NNodes", "NodeList")
_SECONDS_OF_SACCT = 5.0
_SECONDS_BETWEEN = 0.5


class QueueError(ValueError):
    """The queue does not answer, or refuses what it is asked."""


class RefusedError(QueueError):
    """The queue answers, and refuses what it is asked."""


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """A job as the queue knows it.

    Attributes:
        id: number of the job, or ARRAY_ELEMENT.
        state: SLURM's word, in capitals; of a local job RUNNING.
        reason: why it waits, or how it ended; empty if there is nothing to say.
        start: unix seconds at which it started or is expected to, None if nobody knows.
        end: unix seconds at which it ended or its time is up, None if nobody knows.
        time_left_seconds: until its time limit; None unless it runs and has one.
        nodes: number of nodes that it has or asks for.
        exit_code: of the batch script, 128 + n if signal n ended it; None while it is not over.
        restarts: how often it was requeued.
        node_list: its nodes, as SLURM abbreviates them.
    """

    id: str
    state: str
    reason: str = ""
    start: float | None = None
    end: float | None = None
    time_left_seconds: float | None = None
    nodes: int | None = None
    exit_code: int | None = None
    restarts: int = 0
    node_list: str = ""

    @property
    def over(self) -> bool:
        """Whether it will not run any more."""
        return self.state in ENDED


def available() -> bool:
    """Whether SLURM's programs are on the path."""
    return shutil.which("squeue") is not None and shutil.which("scontrol") is not None


def job_states(ids: Collection[str], *, patience: float = PATIENCE) -> dict[str, QueuedJob]:
    """Return id -> job, of those that SLURM still knows.

    Args:
        ids: numbers of jobs; ARRAY_ELEMENT names one of an array.
        patience: seconds that the controller is asked, if it does not answer.

    Raises:
        QueueError: there is no SLURM here, or its controller does not answer.
    """
    if not ids:
        return {}
    fields = ",".join(f"{field}:|" for field in _JOB_FIELDS)
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}", f"--Format={fields}"]
    found = {job.id: job for line in _ask(command, patience, unless=_GONE).splitlines() if (job := _job(line))}
    found = {id_: job for id_, job in found.items() if id_ in ids}
    return found | _past_jobs([id_ for id_ in ids if id_ not in found])


def _job(line: str) -> QueuedJob | None:
    values = [value.strip() for value in line.split("|")]
    if len(values) < len(_JOB_FIELDS):
        return None
    id_, state, reason, start, end, left, restarts, status, nodes, node_list = values[: len(_JOB_FIELDS)]
    running = state in ("RUNNING", "COMPLETING", "CONFIGURING")
    return QueuedJob(
        id=id_,
        state=state,
        reason="" if reason == "None" else reason,
        start=_number(start),
        end=_number(end),
        time_left_seconds=parse_time_left(left) if running else None,
        nodes=_whole(nodes),
        exit_code=_exit_code(_whole(status) or 0) if state in ENDED else None,
        restarts=_whole(restarts) or 0,
        node_list=node_list,
    )


def _past_jobs(ids: Sequence[str]) -> dict[str, QueuedJob]:
    """What the accounting knows of jobs; nothing where there is none, or where it is slow."""
    if not ids or shutil.which("sacct") is None:
        return {}
    command = ["sacct", "-n", "-P", "-X", "-j", ",".join(ids), "-o", ",".join(_SACCT_FIELDS)]
    try:
        answer = _run(command, _SECONDS_OF_SACCT)
    except subprocess.TimeoutExpired:
        return {}
    found = {}
    for line in answer.stdout.splitlines() if answer.returncode == 0 else ():
        values = line.split("|")
        if len(values) == len(_SACCT_FIELDS) and values[0] in ids:
            id_, state, reason, start, end, status, nodes, node_list = values
            code, _, number = status.partition(":")
            found[id_] = QueuedJob(
                id=id_,
                state=state.split()[0],  # "CANCELLED by 1234"
                reason="" if reason == "None" else reason,
                start=_number(start),
                end=_number(end),
                nodes=_whole(nodes),
                exit_code=128 + int(number) if _whole(number) else _whole(code),
                node_list=node_list,
            )
    return found


def local_jobs(ids: Collection[str], mark: str = "submitit") -> dict[str, QueuedJob]:
    """Return id -> job of the jobs of site `local` that run on this machine, whose numbers are those of processes.

    Args:
        ids: numbers of processes.
        mark: a word of their command lines; another process may have got the number of one that is over.
    """
    found = {}
    for id_ in ids:
        with suppress(OSError, ValueError):
            if mark.encode() not in Path(f"/proc/{int(id_)}/cmdline").read_bytes():
                continue
            fields = Path(f"/proc/{int(id_)}/stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
                start = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot
                found[id_] = QueuedJob(id=id_, state="RUNNING", start=start, nodes=1)
    return found


def own_jobs(*, patience: float = PATIENCE) -> dict[str, str]:
    """Return number -> comment of this person's jobs that wait or run; a job of ours names its run directory there.

    Raises:
        QueueError: there is no SLURM here, or its controller does not answer.
    """
    answer = _ask(["squeue", "--noheader", "--me", "--array", "--format=%i|%k"], patience)
    return {id_: comment for id_, _, comment in (line.partition("|") for line in answer.splitlines())}


def node_states(names: Collection[str], *, patience: float = PATIENCE) -> dict[str, str]:
    """Return node -> its state in SLURM's small words ("idle", "allocated", "down*"), of the nodes that it knows.

    Raises:
        QueueError: there is no SLURM here, or its controller does not answer.
    """
    if not names:
        return {}
    command = ["sinfo", "--noheader", "--Node", f"--nodes={','.join(names)}", "--format=%N|%T"]
    pairs = [line.strip().partition("|") for line in _ask(command, patience).splitlines()]
    return {name: state for name, _, state in pairs}


def partition_nodes(partition: str | None, *, patience: float = PATIENCE) -> set[str]:
    """Return the nodes of a partition, whatever their state; None for the one that jobs get which name none.

    Raises:
        QueueError: there is no SLURM here, or its controller does not answer.
    """
    chosen = [] if partition is None else [f"--partition={partition}"]
    answer = _ask(["sinfo", "--noheader", "--Node", *chosen, "--format=%N|%P"], patience)
    pairs = [line.strip().partition("|") for line in answer.splitlines()]
    return {name for name, _, its in pairs if partition is not None or its.endswith("*")}


def partitions(*, patience: float = PATIENCE) -> list[str]:
    """Return the names of the partitions that there are.

    Raises:
        QueueError: there is no SLURM here, or its controller does not answer.
    """
    return sorted(set(_ask(["sinfo", "--noheader", "--all", "--format=%R"], patience).split()))


def lost(state: str) -> bool:
    """Whether a node in this state cannot be worked with: down, drained, failing, or without an answer."""
    return state.endswith("*") or any(word in state for word in _LOST)


def expand(hostlist: str) -> list[str]:
    """Return the nodes that an abbreviated list names: n[1-3,7],x1 -> n1 n2 n3 n7 x1.

    Raises:
        QueueError: it is no such list.
    """
    if hostlist and not re.fullmatch(rf"{_NODES}(,{_NODES})*", hostlist):
        raise QueueError(f"{hostlist!r} is no list of nodes like n[1-3,7],x1")
    parts = (found.group() for found in re.finditer(_NODES, hostlist))
    return ["".join(pieces) for part in parts for pieces in itertools.product(*_pieces(part))]


def _pieces(part: str) -> Iterator[list[str]]:
    for text, ranges in re.findall(r"([^\[\]]+)(?![^\[]*\])|\[([\d,-]+)\]", part):
        yield [text] if text else [number for each in ranges.split(",") for number in _numbers(each)]


def _numbers(text: str) -> list[str]:
    first, _, last = text.partition("-")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]


def scancel(ids: Sequence[str], signal: str | None = None, *, patience: float = PATIENCE) -> None:
    """Cancel jobs, or send a signal to their steps but not to their batch scripts; those that are over do not matter.

    Args:
        ids: numbers of jobs.
        signal: its name, as in TERM; None cancels.
        patience: seconds that the controller is asked, if it does not answer.

    Raises:
        QueueError: it is refused, there is no SLURM here, or its controller does not answer.
    """
    if ids:
        _ask(["scancel", *([f"--signal={signal}"] if signal else []), *ids], patience, unless=_GONE)


def requeue(id_: str, *, patience: float = PATIENCE) -> None:
    """End a running job and put it back into the queue under its number.

    Raises:
        QueueError: it is refused, there is no SLURM here, or its controller does not answer.
    """
    _ask(["scontrol", "requeue", id_], patience, unless=_WAITS_AGAIN)


def excluded(ids: Collection[str], *, patience: float = PATIENCE) -> dict[str, set[str]]:
    """Return id -> nodes that it is kept off, of the jobs that wait or run.

    Raises:
        QueueError: there is no SLURM here, or its controller does not answer.
    """
    if not ids:
        return {}
    # Some versions print nothing for --Format=exc_nodes.
    command = ["squeue", "--noheader", "--array", f"--jobs={','.join(ids)}", "--format=%i|%x"]
    pairs = [line.strip().partition("|") for line in _ask(command, patience, unless=_GONE).splitlines()]
    return {id_: set() if nodes == "(null)" else set(expand(nodes)) for id_, _, nodes in pairs if id_ in ids}


def exclude(ids: Sequence[str], nodes: Sequence[str], *, patience: float = PATIENCE) -> None:
    """Keep waiting jobs off nodes, in place of those that they were kept off before; they keep their age.

    Jobs that wait no longer are left alone.

    Raises:
        RefusedError: SLURM does not know one of the nodes.
        QueueError: there is no SLURM here, or its controller does not answer.
    """
    for id_ in ids:
        _ask(["scontrol", "update", f"JobId={id_}", f"ExcNodeList={','.join(nodes)}"], patience, unless=_NOT_WAITING)


def _ask(command: list[str], patience: float, unless: re.Pattern[str] | None = None) -> str:
    """Return what a program prints; ask again while the controller is away.

    Args:
        command: the program and its arguments.
        patience: seconds.
        unless: complaints that do not matter.
    """
    deadline = time.monotonic() + patience
    while True:
        killed = False
        try:
            answer = _run(command, max(1.0, deadline - time.monotonic()))
            said = answer.stderr.strip()
            if answer.returncode == 0 or (unless and _only(unless, said)):
                return answer.stdout
            # A job that ends, or is requeued, gets a signal for all of its processes: also for one that asks from it.
            killed = answer.returncode < 0
            said = said or f"it was ended by signal {-answer.returncode}" if killed else said
        except FileNotFoundError:
            raise QueueError(
                f"no {command[0]} found: run this where SLURM is, or name the site that the run was submitted to"
            ) from None
        except subprocess.TimeoutExpired:
            said = "timed out"
        if not killed and not AWAY.search(said):
            raise RefusedError(f"{' '.join(command[:2])}: SLURM refuses it: {_first_line(said)}")
        if time.monotonic() + _SECONDS_BETWEEN >= deadline:
            raise QueueError(
                f"SLURM's controller did not answer {command[0]} within {patience:.0f} s ({said.splitlines()[-1]}); try"
                " again in a minute"
            )
        time.sleep(_SECONDS_BETWEEN)


def _first_line(said: str) -> str:
    return next(iter(said.splitlines()), "it does not say why")


def _only(pattern: re.Pattern[str], said: str) -> bool:
    return bool(said) and all(pattern.search(line) for line in said.splitlines())


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    # Time stamps as unix seconds: no time zone to guess. A site's own SQUEUE_* variables would add conditions.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SINFO_"))}
    return subprocess.run(
        command,
        env=environment | {"SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def _exit_code(status: int) -> int:
    """Return what a shell would show for a process's wait status."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _number(text: str) -> float | None:
    return float(text) if text.isdecimal() else None


def _whole(text: str) -> int | None:
    return int(text) if text.isdecimal() else None
