"""Which failure of an attempt the others follow from: ranks whose peer is gone fail too, and are killed at the end."""

from __future__ import annotations

import math
import re
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from monitoring.crashes.last_words import Death, deaths, exception, fatal_error, signal_name, tail
from monitoring.reading.launches import Launch, launch_of, read_jobs
from monitoring.runlog import JsonlFollower, Record, read_outcome

LOG_BYTES = 256 << 10
"""How much of the end of a log is read."""

_BY_CODE = {11: "diverged", 12: "refused", 13: "unhealthy node"}
_FATAL_SIGNALS = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")
_ALL_LOG_BYTES = 32 << 20
_EXCEPTIONS_OF_MEMORY = ("OutOfMemoryError", "MemoryError")
_WORDS_OF_MEMORY = ("out of memory", "cannot allocate memory", "can't allocate memory")
# What a rank says whose peer is gone: it is not the first that failed.
_OF_A_PEER = re.compile(r"connection|\bpeer|remote process|broken pipe|timed out|NCCL|RCCL|gloo|socket", re.IGNORECASE)


@dataclass
class Case:
    """What lies on the disk of an attempt that has ended.

    Attributes:
        run_dir: the run's directory.
        folder: the attempt's.
        outcome: how it ended, empty if it left none.
        launch: that began it, None if it was started by hand.
        ranks: host and pid of every rank, as far as they are known.
        failures: what ranks wrote as they failed, the first first.
        hang: the conclusion of a hang, empty if there is none.
        lost: node -> reason of those that were lost with its job.
        logs: the files with the output of its ranks and launcher, relative to the run directory; the launcher's first.
        began: when its directory was last changed before its ranks trained (unix seconds), 0 if that is unknown.
    """

    run_dir: Path
    folder: Path
    outcome: Record
    launch: Launch | None
    ranks: list[Record]
    failures: list[Record]
    hang: Record
    lost: dict[str, str]
    logs: list[str]
    began: float

    @classmethod
    def read(cls, run_dir: Path, attempt: int) -> Case:
        """Return what there is.

        Raises:
            RunLogError: there is no such run directory.
        """
        folder, outcome = run_dir / "attempts" / f"{attempt:04d}", read_outcome(run_dir, attempt) or {}
        launch = launch_of(read_jobs(run_dir), attempt)
        ranks = read_json(folder / "environment.json").get("ranks")
        failures = sorted(folder.glob("failure-*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        logs = [] if launch is None or not launch.log else sorted((run_dir / launch.log).glob("*.log"), key=_order)
        return cls(
            run_dir=run_dir,
            folder=folder,
            outcome=outcome,
            launch=launch,
            ranks=[each for each in ranks if isinstance(each, dict)] if isinstance(ranks, list) else [],
            failures=[found | {"source": path.name} for path in failures if (found := read_json(path))],
            hang=read_json(folder / "hang.json"),
            lost=_lost(run_dir, launch),
            logs=[str(path.relative_to(run_dir)) for path in logs],
            began=_modified(folder / "environment.json"),
        )

    @property
    def hosts(self) -> list[str]:
        """The hosts of the ranks, each once, in order."""
        return list(dict.fromkeys(str(each.get("host")) for each in self.ranks))

    def host(self, rank: int | None) -> str | None:
        """Return the name of a rank's node: the queue's, which nodes of one host do not share, else the host's."""
        if rank is None or not 0 <= rank < len(self.ranks):
            return None
        if self.launch is not None and self.launch.nodes:
            return self.launch.nodes[min(rank // self._ranks_per_node(), len(self.launch.nodes) - 1)]
        return self.ranks[rank].get("host")

    def rank(self, pid: int | None) -> int | None:
        """Return the rank of a process; none if several hosts have one of that number."""
        ranks = [rank for rank, each in enumerate(self.ranks) if pid is not None and each.get("pid") == pid]
        return ranks[0] if len(ranks) == 1 else None

    def log_of(self, rank: int | None) -> str | None:
        """Return the file with the output of a rank's node."""
        outputs = [log for log in self.logs if Path(log).name.startswith("node-")] or self.logs
        if rank is None or not self.ranks or len(outputs) < 2:
            return outputs[0] if outputs else None
        name = f"node-{rank // self._ranks_per_node()}.log"
        return next((log for log in outputs if Path(log).name == name), None)

    def _ranks_per_node(self) -> int:
        nodes = len(self.launch.nodes) if self.launch is not None else 0
        return max(1, math.ceil(len(self.ranks) / max(1, nodes)))

    def log_tails(self) -> list[tuple[str, list[str]]]:
        """Return every log with its last lines, of bounded size in all."""
        most = max(2048, min(LOG_BYTES, _ALL_LOG_BYTES // max(1, len(self.logs))))
        return [(log, tail(self.run_dir / log, most)) for log in self.logs]


@dataclass
class Verdict:
    """Which failure it was.

    Attributes:
        name, kind, rank, host, step, phase, log, evidence: as in the report (`crashes.report`), `class` is `name`.
        reason: in words, as far as somebody wrote it down.
        text: stacks found in a log.
    """

    name: str
    kind: str | None = None
    rank: int | None = None
    host: str | None = None
    step: int | None = None
    phase: str | None = None
    log: str | None = None
    reason: str = ""
    evidence: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


def judge(case: Case) -> Verdict:
    """Return the failure that the others follow from."""
    tails = case.log_tails()
    notes = [(log, death) for log, lines in tails for death in deaths(lines)]
    return (
        _by_code(case)
        or _lost_node(case, notes)
        or _hang(case)
        or _cancelled(case, notes)
        or _killed(case, notes, tails)
        or _raised(case)
        or _fatal(tails)
        or _said_in_log(case, notes, tails)
        or _by_status(case, notes)
    )


def _by_code(case: Case) -> Verdict | None:
    name, outcome = _BY_CODE.get(case.outcome.get("exit_code") or 0), case.outcome
    if name is None:
        return None
    hosts = outcome.get("hosts")
    host = str(hosts[0]) if isinstance(hosts, list) and hosts else outcome.get("host")
    reason = str(outcome.get("reason", ""))
    return Verdict(name=name, host=host, rank=outcome.get("rank"), step=outcome.get("step"), reason=reason)


def _lost_node(case: Case, notes: list[tuple[str, Death]]) -> Verdict | None:
    said = next((death for _, death in notes if death.kind == "node"), None)
    if said is None and not case.lost:
        return None
    evidence = [f"{node}: {reason}" for node, reason in case.lost.items()] + ([] if said is None else [said.line])
    host = next(iter(case.lost), None) or (None if said is None else said.host)
    return Verdict(name="node lost", host=host, reason=evidence[0], evidence=evidence)


def _hang(case: Case) -> Verdict | None:
    if not case.hang:
        return None
    stalled = case.hang.get("stalled")
    first = next((each for each in stalled if isinstance(each, dict)), {}) if isinstance(stalled, list) else {}
    return Verdict(
        name="hang",
        rank=first.get("rank"),
        host=first.get("host"),
        step=first.get("step"),
        phase=first.get("phase"),
        reason=str(case.hang.get("reason", "")).removeprefix("hang: "),
        evidence=["hang.json"],
    )


def _killed(case: Case, notes: list[tuple[str, Death]], tails: list[tuple[str, list[str]]]) -> Verdict | None:
    """Return who was ended by the system; not those whom the launcher ended because another rank had failed."""
    memory = next(((log, death) for log, death in notes if death.kind == "memory"), None)
    first = next(((log, death) for log, death in notes if death.kind in ("signal", "exit")), None)
    name, kind = "out of memory", None
    if memory is not None:
        log, death = memory
        if death.rank is None and first is not None and first[1].detail == "SIGKILL":
            death = first[1]  # which says who it was
    elif first is not None and first[1].kind == "signal" and first[1].detail != "SIGTERM":  # which launchers send
        log, death = first
        name, kind = _name_of(death.detail), death.detail
        if not all(_OF_A_PEER.search(_error(failure)[-1]) for failure in case.failures):
            return None
    else:
        return None
    rank = case.rank(death.pid) if death.rank is None else death.rank
    evidence = list(dict.fromkeys([death.line, *([] if memory is None else [memory[1].line])]))
    of_node = log if rank is None else case.log_of(rank)
    fatal = next((found for own, lines in tails if own == of_node and (found := fatal_error(lines))), None)
    text = fatal[1] if fatal is not None and fatal[0] == kind else []
    return Verdict(name=name, kind=kind, rank=rank, host=death.host, log=of_node, evidence=evidence, text=text)


def _name_of(signal: str) -> str:
    return "fatal signal" if signal in _FATAL_SIGNALS else "killed"


def _error(failure: Record) -> list[str]:
    """Return the lines of the exception that a rank wrote down, at least one."""
    return failure_text(failure).strip().splitlines() or [""]


def failure_text(failure: Record) -> str:
    """Return the traceback that a rank wrote down, "" if it wrote none."""
    error = failure.get("error")
    return "".join(map(str, error)) if isinstance(error, list) else ""


def _raised(case: Case) -> Verdict | None:
    """Return the exception that the outcome speaks of, else the first that a rank wrote down."""
    if not case.failures and "exit_code" not in case.outcome:
        return None
    own = case.outcome.get("rank")
    first = next((each for each in case.failures if each.get("rank") == own), None)
    first = first or (case.failures[0] if case.failures else {})
    error = _error(first)
    kind, message, _ = exception(error) or (None, error[-1], [])
    reason = str(case.outcome.get("reason") or "") or f"{kind}: {message}"
    text = f"{kind} {message} {reason}"
    memory = kind in _EXCEPTIONS_OF_MEMORY or any(words in text.lower() for words in _WORDS_OF_MEMORY)
    return Verdict(
        name="out of memory" if memory else "exception",
        kind=kind,
        rank=first.get("rank", own),
        host=first.get("host") or case.outcome.get("host"),
        step=first.get("step"),
        phase=first.get("phase"),
        reason=reason,
        evidence=[str(first["source"])] if first else ["outcome.json"],
    )


def _fatal(tails: list[tuple[str, list[str]]]) -> Verdict | None:
    for log, lines in tails:
        if found := fatal_error(lines):
            return Verdict(name="fatal signal", kind=found[0], log=log, evidence=[found[1][0]], text=found[1])
    return None


def _cancelled(case: Case, notes: list[tuple[str, Death]]) -> Verdict | None:
    """Return that the job was ended from outside, unless its ranks failed by themselves."""
    if case.failures or case.outcome:
        return None
    reason = "" if case.launch is None else case.launch.reason
    said = next((death for _, death in notes if death.kind == "cancelled"), None)
    if said is not None:
        return Verdict(name="cancelled", kind=said.detail, reason=f"by the queue: {said.detail}", evidence=[said.line])
    if "told to end by" in reason or "ended by the link" in reason:
        return Verdict(name="cancelled", reason=reason, evidence=["jobs.jsonl"])
    return None


def _first_exit(case: Case, notes: list[tuple[str, Death]]) -> tuple[int | None, Death] | None:
    """Return the rank of which the launcher spoke first, if it did, and what it said."""
    death = next((death for _, death in notes if death.kind in ("signal", "exit")), None)
    return None if death is None else (case.rank(death.pid) if death.rank is None else death.rank, death)


def _said_in_log(case: Case, notes: list[tuple[str, Death]], tails: list[tuple[str, list[str]]]) -> Verdict | None:
    """Return the exception in a log: that of the rank which the launcher named, if it did."""
    first = _first_exit(case, notes)
    rank = None if first is None else first[0]
    own = None if rank is None else case.log_of(rank)
    for log, lines in sorted(tails, key=lambda pair: pair[0] != own):
        if found := exception(lines):
            kind, message, text = found
            who = rank if log == own else None
            reason = f"{kind}: {message}"
            return Verdict(name="exception", kind=kind, rank=who, log=log, reason=reason, evidence=[log], text=text)
    return None


def _by_status(case: Case, notes: list[tuple[str, Death]]) -> Verdict:
    """Return what is left to say: by the launcher's words or exit status, or that the node outlived its processes."""
    first, status = _first_exit(case, notes), None if case.launch is None else case.launch.status
    if first is not None:
        rank, death = first
        if death.kind == "signal":
            kind = death.detail
            return Verdict(name=_name_of(kind), kind=kind, rank=rank, host=death.host, evidence=[death.line])
        reason = f"a process ended with exit code {death.detail}"
        return Verdict(name="unknown", rank=rank, host=death.host, reason=reason, evidence=[death.line])
    number = 0 if status is None else -status if status < 0 else status - 128
    rank = 0 if len(case.ranks) == 1 else None
    if 0 < number < 65:
        kind = signal_name(number)
        return Verdict(name=_name_of(kind), kind=kind, rank=rank, evidence=[f"the launcher's exit status {status}"])
    if status is not None:
        return Verdict(name="unknown", reason=f"the launcher ended with status {status}")
    if case.hosts == [socket.gethostname()] and _booted() < case.began:
        return Verdict(name="killed", rank=rank, evidence=["its processes are gone, and the node has not died since"])
    return Verdict(name="unknown")


def _booted() -> float:
    """Return when this node started (unix seconds); for ever after, if it does not say."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
            if line.startswith("btime "):
                return float(line.split()[1])
    return math.inf


def _lost(run_dir: Path, launch: Launch | None) -> dict[str, str]:
    """Return the nodes that were lost with the job of a launch, as the links found out."""
    lost = {}
    for record in JsonlFollower(run_dir / "quarantine.jsonl", "node", str).poll():
        reason = str(record.get("reason", ""))
        if launch is not None and record["node"] in launch.nodes and _names(reason, launch):
            lost[record["node"]] = reason
    return lost


def _names(reason: str, launch: Launch) -> bool:
    return reason in (f"lost during job {launch.job}", f"lost after job {launch.job}")


def _modified(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def read_json(path: Path) -> Record:
    """Return the object in a file, empty if there is none that can be read."""
    with suppress(OSError, ValueError):
        content: Any = orjson.loads(path.read_bytes())
        return content if isinstance(content, dict) else {}
    return {}


def _order(path: Path) -> tuple[bool, int, str]:
    """The launcher's own messages first: it says who was first; then the nodes by number."""
    number = path.stem.rpartition("-")[2]
    return path.name.startswith("node-"), int(number) if number.isdecimal() else 0, path.name
