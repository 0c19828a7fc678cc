"""Where a node keeps checkpoints for itself, in its memory or on its own disk.

    DIR/rookery-UID/              of this user alone
      RUNID/.lock                 held, shared, by every process of a run in progress
      RUNID/NODE/step-00000120/   laid out and committed like a checkpoint of the run directory

DIR may be open to all users of the machine, as /dev/shm is: what others could have put there is refused.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_prep.world import World
from pipeline.checkpoints.commit import remove_directory, remove_leftovers
from pipeline.checkpoints.manifest import checkpoints_in
from pipeline.errors import ConfigError
from pipeline.launch import node_name, ranks_of_nodes

# So long after its last save a run without a process may still be started again from what it left.
_ABANDONED_SECONDS = 3600.0
_LOCK = ".lock"
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ADVICE = "name another directory (checkpoint.memory.directory, checkpoint.local.directory), or do without the tier"
_REMOVE = f"have it removed, or {_ADVICE}"


@dataclass(kw_only=True)
class NodeTierConfig:
    """Checkpoints in a place that is private to each node."""

    every: int | None = None
    """Steps between them; null: none."""
    keep: int = 2
    """Number of newest ones that a node keeps."""
    directory: str | None = None
    """A directory of every node: of a file system in its memory, or of a disk of its own."""
    replicate: bool = False
    """Hold a copy of another node's files too, sent over MPI, so that the loss of one node loses nothing."""

    def check(self, name: str) -> None:
        """Refuse values without a meaning; `name` is the tier's, memory or local.

        Raises:
            ConfigError: with the dotted path.
        """
        path = f"checkpoint.{name}"
        if self.every is not None and self.every < 1:
            raise ConfigError(f"{path}.every: {self.every} is not positive; use null for none")
        if self.keep < 1:
            raise ConfigError(f"{path}.keep: {self.keep} is not positive; use {path}.every=null for none")
        if self.every is not None and self.directory is None:
            raise ConfigError(f"{path}.directory: null, but {path}.every is set; name a directory of every node")
        if self.directory is not None and not Path(self.directory).is_absolute():
            raise ConfigError(f"{path}.directory: {self.directory!r} is not an absolute path")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this rank stands.

    Attributes:
        nodes: the ranks of each node.
        names: the name of each node: the same after a restart on the same hosts, and of one node only.
        index: number of its node, from 0.
        place: its place in the node, from 0; the first acts for the node.
    """

    nodes: list[list[int]]
    names: list[str]
    index: int
    place: int

    @property
    def name(self) -> str:
        """The name of its node."""
        return self.names[self.index]


def find_place(world: World) -> Place:
    """Return where this rank stands; a collective.

    Raises:
        ConfigError: LOCAL_WORLD_SIZE makes a node of several hosts, or is wrong otherwise; on every rank.
    """
    with world.guard("nodes"):
        nodes, hosts = ranks_of_nodes(world), world.allgather(node_name())
        names = [_name(ranks, nodes, hosts) for ranks in nodes]
    index = next(index for index, ranks in enumerate(nodes) if world.rank in ranks)
    return Place(nodes=nodes, names=names, index=index, place=nodes[index].index(world.rank))


def _name(ranks: list[int], nodes: list[list[int]], hosts: list[str]) -> str:
    host, *others = sorted({hosts[rank] for rank in ranks})
    if others:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE: makes one node of ranks on {host} and {others[0]}, which see different directories;"
            " start as many ranks on each host as it says"
        )
    alike = [other for other in nodes if hosts[other[0]] == host]
    return host if len(alike) == 1 else f"{host}-{alike.index(ranks)}"


class NodeTier:
    """The directory into which a node saves. While any process has it open, no other run takes its run for dead.

    Args:
        directory: the tier's.
        run_id: identity of the run.
        node: the node's name.

    Attributes:
        path: DIR/rookery-UID/RUNID/NODE, which it makes.

    Raises:
        ConfigError: it cannot be made, or another user could have planted what is there.
    """

    def __init__(self, directory: Path, run_id: str, node: str) -> None:
        self._lock = -1
        try:
            run = _root(directory, make=True) / _plain(run_id)
            self.path = run / _plain(node)
            while not _leads_to(run / _LOCK, self._lock):  # another run may just be clearing it away
                self.close()
                run.mkdir(mode=0o700, exist_ok=True)
                with suppress(FileNotFoundError):
                    self._lock = os.open(run / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                    fcntl.flock(self._lock, fcntl.LOCK_SH)
            self.path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            self.close()
            raise ConfigError(f"{directory}: a node cannot keep checkpoints there ({error}); {_ADVICE}") from None

    def close(self) -> None:
        """Let go of it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _leads_to(path: Path, descriptor: int) -> bool:
    """Return whether what was opened at `path` is still there."""
    try:
        return descriptor >= 0 and os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _plain(name: str) -> str:
    if not _PLAIN.fullmatch(name):
        raise ConfigError(f"{name!r}: cannot be the name of a directory of a node's checkpoints")
    return name


def _root(directory: Path, *, make: bool) -> Path:
    """Return DIR/rookery-UID, of which it is sure that nobody else can write to it, or that it is not there.

    Raises:
        ConfigError: another user could have put files into it, or could exchange it for another.
        OSError: `directory` is not there.
    """
    status = directory.stat()
    sticky = status.st_mode & stat.S_ISVTX
    if status.st_uid not in (0, os.geteuid()) and not sticky:
        raise ConfigError(
            f"{directory}: belongs to another user (uid {status.st_uid}), who may rename what is in it, so that a"
            f" checkpoint there could be anybody's; {_ADVICE}"
        )
    if status.st_mode & 0o022 and not sticky:
        raise ConfigError(
            f"{directory}: others may rename what is in it, so that a checkpoint there could be anybody's;"
            f" `chmod +t` it, or {_ADVICE}"
        )
    root = directory / f"rookery-{os.geteuid()}"
    with suppress(FileExistsError):
        if make:
            root.mkdir(mode=0o700)
    with suppress(FileNotFoundError):
        status = root.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise ConfigError(f"{root}: is not a directory (a link?), so that anybody may have put it there; {_REMOVE}")
        if status.st_uid != os.geteuid():
            raise ConfigError(f"{root}: belongs to another user (uid {status.st_uid}); {_REMOVE}")
        if status.st_mode & 0o022:
            raise ConfigError(f"{root}: others may write to it (mode {stat.S_IMODE(status.st_mode):o}); {_REMOVE}")
    return root


def directories_of_run(tiers: Mapping[str, NodeTierConfig], run_id: str) -> Iterator[tuple[str, Path]]:
    """Yield, for each tier where this machine has something of a run, its name and DIR/rookery-UID/RUNID.

    A tier that is not in use any more may hold the newest checkpoint.

    Raises:
        ConfigError: another user could have planted what is there, where a tier in use is.
    """
    for name, config in tiers.items():
        if config.directory is None:
            continue
        try:
            run = _root(Path(config.directory), make=False) / _plain(run_id)
        except OSError:  # what cannot be looked at will not be saved into either, and that says why
            continue
        except ConfigError:
            if config.every is not None:
                raise
            continue
        if run.is_dir():
            yield name, run


def nodes_in(run: Path) -> list[Path]:
    """Return the directories of nodes in DIR/rookery-UID/RUNID; one machine may have been called several nodes."""
    with suppress(FileNotFoundError):  # another process may just be removing it
        return sorted(path for path in run.iterdir() if _PLAIN.fullmatch(path.name) and path.is_dir())
    return []


def discard_newer(world: World, tiers: Mapping[str, NodeTierConfig], run_id: str, step: int) -> None:
    """Remove what a run that begins again after `step` must not come back to; a collective, before the first save.

    That is what it saved later, what killed saves and removals left, and what this machine held as a node that it is
    no more.

    Raises:
        OSError: it cannot be removed; on every rank.
    """
    place = find_place(world)
    with world.guard("removal of newer checkpoints of the nodes"):
        for _, run in directories_of_run(tiers, run_id) if place.place == 0 else ():
            for node in nodes_in(run):
                if node.name not in place.names:
                    shutil.rmtree(node, ignore_errors=True)  # several nodes on this host may be at it
                elif node.name == place.name:
                    remove_leftovers(node)
                    for path in checkpoints_in(node):
                        if int(path.name.removeprefix("step-")) > step:
                            remove_directory(path)


def discard_all(world: World, tiers: Mapping[str, NodeTierConfig], run_id: str) -> None:
    """Give back what the nodes hold of a run that has finished; a collective, after the last write of every rank."""
    place = find_place(world)  # which is also where the ranks wait for each other
    with world.guard("removal of the nodes' checkpoints"):
        for name, config in tiers.items() if place.place == 0 else ():
            with suppress(ConfigError):  # what others have done to the directory is nothing to a run that has finished
                for _, run in directories_of_run({name: config}, run_id):
                    shutil.rmtree(run, ignore_errors=True)


def discard_abandoned(directory: Path, run_id: str) -> list[str]:
    """Remove what other runs of this user left on this node, and return their names; only one rank of a node need.

    A run is abandoned when no process has a `NodeTier` of it open, and none has saved for an hour.
    """
    with suppress(OSError):
        root = _root(directory, make=False)
        for leftover in root.glob(".*.removed"):
            shutil.rmtree(leftover, ignore_errors=True)
        others = [path for path in root.iterdir() if _PLAIN.fullmatch(path.name) and path.name != run_id]
        return [run.name for run in others if run.is_dir() and _remove_if_abandoned(run)]
    return []


def _remove_if_abandoned(run: Path) -> bool:
    lock = -1
    try:
        lock = os.open(run / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        last = max(path.stat().st_mtime for path in (run, *nodes_in(run)))
        if time.time() - last < _ABANDONED_SECONDS or not _leads_to(run / _LOCK, lock):
            return False
        remove_directory(run)
    except OSError:  # it is alive, or another run is removing it
        return False
    finally:
        if lock >= 0:
            os.close(lock)
    return True
