"""Ends a run in which a rank hangs, and writes down who it was and where everyone stood; tells that a run lives.

A thread of every rank compares the clock with the time that the rank's present work may take. When it is over the
ranks leave in `attempts/NNNN/hang/` one file each: what the journal says, then the stacks of all threads. A rank that
cannot (it is stopped, or in the kernel) is described by the others of its node, which see its journal's memory. One
rank draws the conclusion, hang.json, outcome.json and crash.json, and all of them end.

The same thread leaves signs of life: rank 0 `heartbeat.json`, and one rank of each node `nodes/HOST.json`, which tells
where the node's ranks stood should all of them be killed.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monitoring.crashes.report import write_crash_report
from monitoring.runlog import write_atomic
from pipeline.attempt import write_outcome
from pipeline.journal import Journal, Standing, process_state
from pipeline.step_cost import StepCost

if TYPE_CHECKING:
    from data_prep.world import World
    from pipeline.control import ControlConfig

_TICK_SECONDS = 1.0
_HEARTBEAT_SECONDS = 10.0
_NODES_A_SECOND = 10.0  # that write their heartbeat: more would be felt by a shared file system
# The limits of the ranks differ by what each of them measured; those who are late get this long, as a part of it.
_PATIENCE = 0.25
_MOST_PATIENCE_SECONDS = 60.0
_CONCLUDE_SECONDS = 5.0
_LAST_RESORT_SECONDS = 120.0
_STDERR = 2  # whatever sys.stderr has become

_NOT_RUNNING = {"T": " (stopped by a signal)", "t": " (stopped by a debugger)", "Z": " (ended)", "": " (gone)"}


class Watchdog:
    """The watching thread of one rank.

    Args:
        config: the limits.
        world: the ranks.
        journal: where this rank stands.
        directory: `attempts/NNNN`.
    """

    def __init__(self, config: ControlConfig, world: World, journal: Journal, directory: Path) -> None:
        self._config, self._world, self._journal, self._directory = config, world, journal, directory
        self._hosts: list[str] = world.allgather(socket.gethostname())
        self._first_of_node = self._hosts.index(self._hosts[world.rank]) == world.rank
        self._beat_seconds = max(_HEARTBEAT_SECONDS, len(set(self._hosts)) / _NODES_A_SECOND)
        self._cost = StepCost()
        self._deadline: tuple[float, float] | None = None  # when, and the limit that led to it
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def longest_step(self) -> float:
        """Seconds of the longest of the last steps."""
        return self._cost.longest

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        if self._first_of_node:
            self._beat_node()  # where its ranks stood when this one failed, or ended

    def expected(self, batches: int, n: float, k: float) -> float | None:
        """Return what a step should take (see `StepCost.add`), in seconds; None before enough steps are known."""
        return self._cost.seconds(batches, n, k)

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """End the run if the block takes longer."""
        if self._config.watchdog:
            self._deadline = (time.monotonic() + seconds, seconds)
        try:
            yield
        finally:
            self._deadline = None

    @contextmanager
    def step(self, batches: int, n: float, k: float) -> Iterator[None]:
        """End the run if the block, a step (see `StepCost.add`), takes much longer than its depth costs."""
        expected, started = self.expected(batches, n, k), time.monotonic()
        if expected is None:
            limit = self._config.hang_start_minutes * 60.0
        else:
            limit = max(self._config.hang_floor_seconds, self._config.hang_factor * expected)
        with self.limit(limit):
            yield
        self._cost.add(batches, n, k, time.monotonic() - started)

    def _watch(self) -> None:
        ticked, beat, node_beat = time.monotonic(), -math.inf, -math.inf
        watched, suspended = None, 0.0
        while True:
            now = time.monotonic()
            if self._world.rank == 0 and now - beat >= _HEARTBEAT_SECONDS:
                beat = now
                self._beat()
            if self._first_of_node and now - node_beat >= self._beat_seconds:
                node_beat = now
                self._beat_node()
            if self._ended.wait(_TICK_SECONDS):
                break
            now, deadline = time.monotonic(), self._deadline
            if deadline is not watched:
                watched, suspended = deadline, 0.0
            if now - ticked > 2.0 * _TICK_SECONDS:  # this process was suspended, while the clock went on
                suspended += now - ticked - _TICK_SECONDS
            ticked = now
            if deadline is None:
                faulthandler.cancel_dump_traceback_later()
                continue
            rest = deadline[0] + suspended - now
            if rest < 0.0:
                self._end(deadline[1])
            # From a thread of C, should the main thread never again let go of the interpreter's lock. It ends nothing:
            # a job that was suspended for long is healthy, and one that is not is ended by the other ranks.
            faulthandler.dump_traceback_later(rest + deadline[1] + _LAST_RESORT_SECONDS, file=_STDERR)
        faulthandler.cancel_dump_traceback_later()

    def _beat(self) -> None:
        standing = self._journal.standing()
        content = {"time": time.time(), "step": standing.step, "phase": standing.phase}
        self._leave(self._directory / "heartbeat.json", content)

    def _beat_node(self) -> None:
        """Leave where the ranks of this node stand, as far as their journals can be read."""
        standings = {self._world.rank: (self._journal.standing(), "R")}
        standings |= {mate.rank: (mate.standing(), mate.state()) for mate in self._journal.mates.values()}
        ranks = {
            str(rank): {"step": standing.step, "phase": standing.phase, "state": state}
            for rank, (standing, state) in sorted(standings.items())
        }
        host = self._hosts[self._world.rank]
        with suppress(OSError):
            (self._directory / "nodes").mkdir(exist_ok=True)
        self._leave(self._directory / "nodes" / f"{host}.json", {"time": time.time(), "host": host, "ranks": ranks})

    def _leave(self, path: Path, content: dict[str, Any]) -> None:
        temporary = path.with_name(f".{path.name}")
        with suppress(OSError):  # a full disk is for the loop to find
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(path)

    def _end(self, limit: float) -> None:
        """Write the reports and end all ranks; does not return."""
        try:
            faulthandler.dump_traceback_later(limit + _LAST_RESORT_SECONDS, exit=True, file=_STDERR)
            reports = Reports(self._directory, self._hosts)
            reports.dump_own(self._world.rank, self._journal.standing(), limit)
            patience = min(_MOST_PATIENCE_SECONDS, max(_TICK_SECONDS * 2, _PATIENCE * limit))
            time.sleep(patience)
            for mate in self._journal.mates.values():
                reports.describe(mate.rank, mate.standing(), mate.state(), by=self._world.rank)
            # The lowest rank that lives concludes; the others do should it end before it has.
            time.sleep(_CONCLUDE_SECONDS * min(reports.living().index(self._world.rank), 2))
            reason = reports.conclude(limit)
            if reason is not None:
                sys.stderr.write(f"rookery: {reason}\n")
                sys.stderr.flush()
                write_crash_report(self._directory.parent.parent, int(self._directory.name))
            for mate in self._journal.mates.values():
                if process_state(mate.pid) == "T":  # it cannot be asked to end
                    os.kill(mate.pid, signal.SIGKILL)
        finally:
            faulthandler.dump_traceback_later(_CONCLUDE_SECONDS, exit=True, file=_STDERR)
            self._world.abort(1)
            os._exit(1)


class Reports:
    """What the ranks leave of a hang in an attempt's directory.

    Args:
        directory: `attempts/NNNN`.
        hosts: the host of every rank.
    """

    def __init__(self, directory: Path, hosts: list[str]) -> None:
        self._attempt, self._directory, self._hosts = directory, directory / "hang", hosts
        self._directory.mkdir(exist_ok=True)

    def dump_own(self, rank: int, standing: Standing, limit: float) -> None:
        """Leave where this rank stands, and the stacks of its threads."""
        record = self._record(rank, standing, "R", None)
        with self._path(rank).open("w", encoding="utf-8") as file:
            file.write(json.dumps(record | {"limit_seconds": limit}) + "\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)

    def describe(self, rank: int, standing: Standing, state: str, *, by: int) -> None:
        """Leave what rank `by` knows of another rank of its node, unless something has been left."""
        with suppress(FileExistsError), self._path(rank).open("x", encoding="utf-8") as file:
            file.write(json.dumps(self._record(rank, standing, state, by)) + "\n")

    def living(self) -> list[int]:
        """Return the ranks that described themselves, sorted."""
        return [record["rank"] for record in self._records() if record["described_by"] is None]

    def conclude(self, limit: float) -> str | None:
        """Write hang.json, and outcome.json unless there is one; return the reason, None if another rank did it."""
        if (self._attempt / "hang.json").exists():
            return None
        records = self._records()
        silent = sorted(set(range(len(self._hosts))) - {record["rank"] for record in records})
        stalled = find_stalled(records)
        stalled += [{"rank": rank, "host": self._hosts[rank], "state": "silent"} for rank in silent]
        where = "; ".join(_sentence(record) for record in stalled) or (
            f"all ranks stand at the same place ({_place(records[0])}): look at the network and the accelerators"
        )
        reason = f"hang: nothing moved for {limit:.0f} s. {where}"
        report = {"reason": reason, "stalled": stalled, "ranks": records, "time": time.time()}
        write_atomic(self._attempt / "hang.json", json.dumps(report, indent=1).encode())
        write_outcome(self._attempt, 1, reason, hang="hang.json", ranks=[record["rank"] for record in stalled])
        return reason

    def _records(self) -> list[dict[str, Any]]:
        records = []
        for path in sorted(self._directory.glob("rank-*.txt")):
            with suppress(ValueError), path.open(encoding="utf-8") as file:  # one that is just being written
                records.append(json.loads(file.readline()))
        return records

    def _record(self, rank: int, standing: Standing, state: str, by: int | None) -> dict[str, Any]:
        now, record = time.monotonic(), asdict(standing)
        record["phase_seconds"] = round(now - record.pop("phase_since"), 1)
        record["collective_seconds"] = round(now - record.pop("collective_since"), 1)
        return {"rank": rank, "host": self._hosts[rank], "state": state, "described_by": by, **record}

    def _path(self, rank: int) -> Path:
        return self._directory / f"rank-{rank:05d}.txt"


def find_stalled(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of those that the others wait for.

    That is who is stopped or gone; else who has begun fewer collectives than others; else who is in none while others
    are. Empty if all stand at the same place.
    """
    stopped = [record for record in records if record["state"] in _NOT_RUNNING]
    last = max((record["number"] for record in records), default=0)
    behind = [record for record in records if record["number"] < last]
    outside = [record for record in records if not record["inside"]]
    return stopped or behind or (outside if len(outside) < len(records) else [])


def _sentence(record: dict[str, Any]) -> str:
    who = f"rank {record['rank']} on {record['host']}"
    if record["state"] == "silent":
        return f"{who} does not answer, nor does anyone on its node"
    return f"{who}{_NOT_RUNNING.get(record['state'], '')} stands in {_place(record)}"


def _place(record: dict[str, Any]) -> str:
    relation = "in" if record["inside"] else "after"
    return (
        f"{record['phase']} of step {record['step']} for {record['phase_seconds']:.0f} s,"
        f" {relation} collective {record['number']} ({record['collective'] or 'none'}, {record['group']})"
    )
