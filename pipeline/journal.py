"""Where this process stands: phase, step and last collective, readable by the other ranks of its node.

A process that is stopped or hangs in the network cannot answer. So it notes what it does before it does it, with one
copy of a hundred bytes into memory that the ranks of the node map of each other at the start. The memory has no name
in any file system: it ends with its processes, however they end.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from data_prep.world import World

# step, start of the phase, phase, collective's number, start, bytes, whether inside, name, group
_RECORD = struct.Struct("=qd32sqdq?48s32s")

_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "inference_all_reduce",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "broadcast_object_list",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_base",
    "all_gather_coalesced",
    "all_gather_object",
    "all_to_all_single",
    "all_to_all",
    "send",
    "recv",
    "isend",
    "irecv",
    "gather",
    "scatter",
    "barrier",
    "monitored_barrier",
)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a process noted last. Times are those of `time.monotonic`, which all processes of a node share.

    Attributes:
        step: the step in progress, counted from 1; 0 before the first.
        phase: what it does.
        phase_since: when it began that.
        collective: name of the last collective, "" if there was none.
        group: the ranks that take part in it: "world", "node", "between nodes", ...
        number: how many collectives it had begun, this one included.
        bytes: size of its message.
        inside: whether the process still waits in it.
        collective_since: when it entered it.
    """

    step: int
    phase: str
    phase_since: float
    collective: str
    group: str
    number: int
    bytes: int
    inside: bool
    collective_since: float


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What went through the collectives of one group of ranks.

    Attributes:
        count: collectives begun.
        bytes: sum of their messages, as this rank sees them.
        seconds: time in which the host launched them or waited for them; an accelerator may go on afterwards.
    """

    count: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Mate:
    """A process of this node, as its journal and the operating system show it.

    Attributes:
        rank: its rank.
        pid: its process id.
    """

    def __init__(self, rank: int, pid: int, memory: mmap.mmap) -> None:
        self.rank, self.pid, self._memory = rank, pid, memory

    def standing(self) -> Standing:
        """Return what it noted last, also when it is stopped or gone."""
        return _unpack(self._memory[: _RECORD.size])

    def state(self) -> str:
        """Return the state that /proc gives: R running, S sleeping, D in the kernel, T stopped, Z ended, "" gone."""
        return process_state(self.pid)


class Journal:
    """What one process notes of itself.

    Attributes:
        mates: the other processes of this node whose journals can be read, by rank; filled by `share`.
        failed_in: phase in which the first exception that left a phase was raised, None if none was.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | bytearray = bytearray(_RECORD.size)
        self._file: int | None = None
        self._step, self._phase, self._phase_since = 0, "start", time.monotonic()
        self._collective, self._group, self._number, self._bytes = "", "", 0, 0
        self._inside, self._collective_since = False, 0.0
        self._traffic: dict[str, Traffic] = {}
        self._groups: dict[Any, str] = {}
        self.mates: dict[int, Mate] = {}
        self.failed_in: str | None = None

    def share(self, world: World) -> None:
        """Begin a run: let the ranks on this host read this journal, and read theirs; a collective."""
        self.failed_in = None
        if self._file is None:
            self._file = os.memfd_create("rookery-journal", os.MFD_CLOEXEC)
            os.ftruncate(self._file, mmap.PAGESIZE)
            self._memory = mmap.mmap(self._file, mmap.PAGESIZE)
            self._write()
        host = socket.gethostname()
        places = world.allgather((host, os.getpid(), self._file))
        for rank, (where, pid, file) in enumerate(places):
            if where == host and rank != world.rank:
                with suppress(OSError):  # in a container of its own: its journal is out of reach
                    self.mates[rank] = Mate(rank, pid, _map(pid, file))

    def standing(self) -> Standing:
        """Return where this process stands."""
        return Standing(
            step=self._step,
            phase=self._phase,
            phase_since=self._phase_since,
            collective=self._collective,
            group=self._group,
            number=self._number,
            bytes=self._bytes,
            inside=self._inside,
            collective_since=self._collective_since,
        )

    @contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Note that the block is phase `name`, of step `step` if given; the phase around it goes on afterwards."""
        outer = self._phase
        self._step = self._step if step is None else step
        self._enter(name)
        try:
            yield
        except BaseException:
            self.failed_in = self.failed_in or name
            raise
        self._enter(outer)

    @contextmanager
    def collective(self, name: str, size: int = 0, group: str = "world") -> Iterator[None]:
        """Note that the block waits for the ranks of `group` in the collective `name`, a message of `size` bytes."""
        number = self._number = self._number + 1
        self._bytes = size
        started = self._begin_wait(name, group)
        try:
            yield
        finally:
            self._end_wait(number)
            self._count(group, 1, size, time.monotonic() - started)

    def traffic(self) -> dict[str, Traffic]:
        """Return what went through collectives since this process started, by group."""
        return dict(self._traffic)

    def seconds_waited(self) -> float:
        """Return the time in collectives since this process started, as the host sees it."""
        return sum(traffic.seconds for traffic in self._traffic.values())

    def name_group(self, group: Any, name: str) -> None:
        """Call a process group of `torch.distributed` by `name`; those without one are "world" or "N ranks"."""
        self._groups[group] = name

    def watch_deepspeed(self) -> None:
        """Note all collectives that DeepSpeed begins; after its start, and again after every later one."""
        import deepspeed.comm.comm

        backend = deepspeed.comm.comm.cdb  # everything that DeepSpeed sends passes through this object
        if not hasattr(backend, "rookery_journal"):
            backend.rookery_journal = self
            for name in _COLLECTIVES:
                setattr(backend, name, self._noted(name, getattr(backend, name)))

    def _noted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            groups = (argument for argument in given if isinstance(argument, torch.distributed.ProcessGroup))
            group = self._group_name(next(groups, None))
            with self.collective(name, _message_bytes(given), group):
                handle = function(*args, **kwargs)
            return self.noted_work(handle, name, group) if hasattr(handle, "wait") else handle

        return noted

    def noted_work(self, work: Any, name: str, group: str) -> Any:
        """Return the handle of a collective in progress, such that waiting for it is noted."""
        return _NotedWork(work, self, name, group)

    def _group_name(self, group: Any) -> str:
        if group is None:
            return "world"
        if group not in self._groups:
            size = torch.distributed.get_world_size(group)
            self._groups[group] = "world" if size == torch.distributed.get_world_size() else f"{size} ranks"
        return self._groups[group]

    def _wait(self, work: Any, name: str, group: str, arguments: tuple[Any, ...]) -> Any:
        """Wait for a collective that was begun earlier; it is not counted a second time."""
        number, started = self._number, self._begin_wait(f"wait for {name}", group)
        try:
            return work.wait(*arguments)
        finally:
            self._end_wait(number)
            self._count(group, 0, 0, time.monotonic() - started)

    def _enter(self, phase: str) -> None:
        self._phase, self._phase_since = phase, time.monotonic()
        self._write()

    def _begin_wait(self, name: str, group: str) -> float:
        self._collective, self._group, self._inside = name, group, True
        self._collective_since = time.monotonic()
        self._write()
        return self._collective_since

    def _end_wait(self, number: int) -> None:
        if self._number == number:  # no other thread has begun one since
            self._inside = False
            self._write()

    def _write(self) -> None:
        self._memory[: _RECORD.size] = _RECORD.pack(
            self._step,
            self._phase_since,
            self._phase.encode(),
            self._number,
            self._collective_since,
            self._bytes,
            self._inside,
            self._collective.encode(),
            self._group.encode(),
        )

    def _count(self, group: str, count: int, size: int, seconds: float) -> None:
        before = self._traffic.get(group, Traffic())
        self._traffic[group] = Traffic(
            count=before.count + count, bytes=before.bytes + size, seconds=before.seconds + seconds
        )


class _NotedWork:
    """The handle of a collective in progress, whose wait is noted."""

    def __init__(self, work: Any, journal: Journal, name: str, group: str) -> None:
        self._work, self._journal, self._name, self._group = work, journal, name, group

    def wait(self, *arguments: Any) -> Any:
        return self._journal._wait(self._work, self._name, self._group, arguments)  # noqa: SLF001 (its other half)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def process_state(pid: int) -> str:
    """Return the one letter that /proc gives for the state of a process, "" if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0]


def _map(pid: int, file: int) -> mmap.mmap:
    descriptor = os.open(f"/proc/{pid}/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, mmap.PAGESIZE, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)


def _unpack(record: bytes) -> Standing:
    step, phase_since, phase, number, collective_since, size, inside, collective, group = _RECORD.unpack(record)
    return Standing(
        step=step,
        phase=_text(phase),
        phase_since=phase_since,
        collective=_text(collective),
        group=_text(group),
        number=number,
        bytes=size,
        inside=inside,
        collective_since=collective_since,
    )


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")


def _message_bytes(arguments: tuple[Any, ...]) -> int:
    """Return the size of the largest buffer among the arguments: the whole message of a collective."""
    return max((_bytes(argument) for argument in arguments), default=0)


def _bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    if isinstance(argument, list | tuple):
        return sum(_bytes(item) for item in argument)
    return 0


journal = Journal()
"""The journal of this process."""
