"""A real SLURM cluster on this machine: a controller, nodes that can be killed and healed, munge if it is there.

Nodes pretend to have 64 CPUs and eight GPUs of AMD's each. With root and munge `sbcast` works as on a real cluster.
Partitions: `batch` (default), `low`, whose jobs are requeued when others want their nodes, and `high`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "sinfo", "squeue", "scontrol")
GPUS = 8
_PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
_SECONDS_TO_START = 30
_SECONDS_TO_HEAL = 30

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
{authentication}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmdParameters=config_overrides
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=8
SlurmctldTimeout=10
MessageTimeout=5
KillWait=3
UnkillableStepTimeout=20
MinJobAge=3600
JobFileAppend=1
AllowSpecResourcesUsage=Yes
EnforcePartLimits=ALL
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=720 PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=1440 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""
# A requeued job waits until its old credential has expired, by default for two minutes.
_MUNGE = "AuthType=auth/munge\nCredType=cred/munge\nAuthInfo=socket={socket},cred_expire=5"
_NO_MUNGE = "AuthType=auth/none\nCredType=cred/none\nAuthInfo=cred_expire=5"


# What a user of the cluster would write. Its ranks meet without MPI: SLURM 22.05's PMI2 sometimes mangles the addresses
# that MPICH exchanges through it, and ranks then die or hang in MPI_Init. test_srun.py starts ranks with it.
_PROFILE = """\
title: the cluster of the tests
accelerator: cpu
ranks_per_node: 1
cores_per_node: 64
cores_per_rank: 1
signal_seconds: 20
control: torch
srun: ["--mpi=none"]
queues:
  - {partition: batch, max_nodes: 3, hours: 12}
  - {partition: low, max_nodes: 3, hours: 24, default: false}
  - {partition: high, max_nodes: 3, hours: 1, default: false}
"""


def write_profile(configuration: Path) -> None:
    """Write the site profile `test` of such a cluster into a user's directory of configuration (XDG_CONFIG_HOME)."""
    folder = configuration / "rookery/sites"
    folder.mkdir(parents=True)
    (folder / "test.yaml").write_text(_PROFILE)


def missing_programs() -> list[str]:
    """Programs of SLURM that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]


class Cluster:
    """A cluster while its context lasts; a process that outlives this one ends it if this one is killed.

    Args:
        root: an empty directory for all its files; the path of a socket in it may have 107 characters.
        nodes: their number; they are called n1, n2, ...

    Attributes:
        environment: in which SLURM's commands reach the cluster.
        names: of the nodes.
        can_broadcast: whether `sbcast` works: it needs munge, and root to write files as their user.
    """

    def __init__(self, root: Path, nodes: int = 3) -> None:
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf"), "PATH": _PATH}
        self._munge = shutil.which("munged", path=_PATH)
        self.can_broadcast = self._munge is not None and os.geteuid() == 0
        self._root = root
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._slurmd: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        """Start everything and wait until all nodes are idle."""
        self._write_configuration()
        reaper = [sys.executable, __file__, self.environment["SLURM_CONF"]]
        self._reaper = subprocess.Popen(reaper, stdin=subprocess.PIPE, start_new_session=True)
        try:
            if self._munge is not None:
                self._start_munge(self._munge)
            self._start("slurmctld", "-D", "-i")
            for name in self.names:
                self._slurmd[name] = self._start("slurmd", "-D", "-N", name)
            self._wait(lambda: set(self.states().values()) == {"idle"}, "the cluster to start", _SECONDS_TO_START)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill every process of the cluster and of its jobs."""
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait()
        for daemon in self._daemons:
            daemon.wait()

    def sh(self, *command: str, check: bool = True) -> str:
        """Run a command on the login node and return what it wrote to its standard output."""
        done = subprocess.run(
            command, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def states(self) -> dict[str, str]:
        """State of each node, such as idle, allocated, or down* (the star: it does not respond)."""
        rows = self.sh("sinfo", "--noheader", "--Node", "--format=%N %T", "--partition=batch", check=False).splitlines()
        return dict(row.split(maxsplit=1) for row in rows)

    def kill_node(self, name: str) -> None:
        """Let a node lose its power: SIGKILL to its slurmd and to all that jobs run there; SLURM is not told."""
        _kill_until_none_is_left(
            lambda pid: _is_of_cluster(pid, self.environment["SLURM_CONF"]) and self._is_on(pid, name)
        )

    def revive(self, name: str) -> None:
        """Start a killed node again and wait until it takes jobs; the jobs of the cluster are left alone."""
        self._start_if_dead(name)
        self._wait(lambda: self._resumed([name], ("idle", "mixed", "allocated")), f"{name} to be up", _SECONDS_TO_HEAL)

    def heal(self) -> None:
        """Cancel all jobs, start killed nodes again, and wait until every node is idle."""
        self.sh("scancel", *self.sh("squeue", "--noheader", "--format=%A").split(), check=False)
        for name in self.names:
            self._start_if_dead(name)
        self._wait(lambda: self._resumed(self.names, ("idle",)), "all nodes to be idle again", _SECONDS_TO_HEAL)

    def _start_if_dead(self, name: str) -> None:
        if self._slurmd[name].poll() is not None:
            self._slurmd[name] = self._start("slurmd", "-D", "-N", name)

    def _resumed(self, names: Sequence[str], wanted: Sequence[str]) -> bool:
        states = self.states()
        for name in names:
            if states.get(name, "").startswith(("down", "drain")):
                self.sh("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
        return all(states.get(name) in wanted for name in names)

    def _is_on(self, pid: int, name: str) -> bool:
        """A slurmd has its node's name as an argument, a slurmstepd writes to its log, tasks have it as a variable."""
        if f"SLURMD_NODENAME={name}" in _words(pid, "environ") or _words(pid, "cmdline")[2:4] == ["-N", name]:
            return True
        with suppress(OSError):
            log = self._root / f"slurmd.{name}.log"
            return any(descriptor.readlink() == log for descriptor in Path(f"/proc/{pid}/fd").iterdir())
        return False

    def _write_configuration(self) -> None:
        root = self._root
        controller_port, *ports = _free_ports(len(self.names) + 1)
        host = socket.gethostname().split(".")[0]
        for name in ("state", "dev", "munge", *(f"spool.{name}" for name in self.names)):
            (root / name).mkdir()
        for number in range(GPUS):  # a character device is all that a GPU must be
            (root / f"dev/gpu{number}").symlink_to("/dev/null")
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=4000"
            f" Gres=gpu:{GPUS} Feature=nvme State=UNKNOWN"
            for name, port in zip(self.names, ports, strict=True)
        ]
        text = _CONFIGURATION.format(
            host=host,
            controller_port=controller_port,
            user=subprocess.check_output(["id", "-un"], text=True).strip(),
            authentication=_NO_MUNGE if self._munge is None else _MUNGE.format(socket=root / "munge/socket"),
            root=root,
            nodes="\n".join(nodes),
        )
        (root / "slurm.conf").write_text(text)
        gpus = f"Name=gpu File={root}/dev/gpu[0-{GPUS - 1}] Flags=amd_gpu_env"
        (root / "gres.conf").write_text("".join(f"NodeName={name} {gpus}\n" for name in self.names))

    def _start_munge(self, program: str) -> None:
        folder = self._root / "munge"
        (folder / "key").write_bytes(os.urandom(64))
        (folder / "key").chmod(0o600)
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        # Forced: it does not like directories such as /tmp above its own.
        self._run(
            [program, "--foreground", "--force", *(f"--{option}={folder / name}" for option, name in names.items())]
        )
        self._wait((folder / "socket").exists, "munged to start", _SECONDS_TO_START)

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        return self._run([*command, "-f", self.environment["SLURM_CONF"]])

    def _run(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self._root / f"daemon-{len(self._daemons)}.log").open("wb") as log:
            environment = self.environment
            daemon = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._daemons.append(daemon)
        return daemon

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self._root.rglob("*log"))]
                raise RuntimeError("\n".join([f"waited {seconds:g} s for {what}: {self.states()}", *logs]))
            time.sleep(0.1)


def _words(pid: int, file: str) -> list[str]:
    """The zero-terminated words of a file of /proc; none if the process is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace").split("\0")
    return []


def _is_of_cluster(pid: int, configuration: str) -> bool:
    return pid != os.getpid() and f"SLURM_CONF={configuration}" in _words(pid, "environ")


def _kill_until_none_is_left(chosen: Callable[[int], bool]) -> None:
    """SIGKILL to all chosen processes; again, since they may have started others meanwhile."""
    while True:
        alive = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        pids = [pid for pid in alive if chosen(pid)]
        if not pids:
            return
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":  # the reaper: it sees its parent end, in whatever way, by the end of its standard input
    sys.stdin.read()
    _kill_until_none_is_left(lambda pid: _is_of_cluster(pid, sys.argv[1]))
