"""A real SLURM cluster on this machine: one slurmctld, several slurmd, no privileges and no munge needed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "sinfo", "squeue", "scontrol")
_SECONDS_TO_START = 30

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=3
MinJobAge=3600
EnforcePartLimits=ALL
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=720 State=UP
"""


def missing_programs() -> list[str]:
    """Programs of SLURM that are not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


@contextmanager
def slurm_cluster(root: Path, nodes: int = 2) -> Iterator[dict[str, str]]:
    """Start a cluster that lives in `root`; yield the environment in which its commands reach it."""
    configuration = root / "slurm.conf"
    ports = _free_ports(nodes + 1)
    host = socket.gethostname().split(".")[0]
    lines = [
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=4000 State=UNKNOWN"
        for number, port in enumerate(ports[1:], start=1)
    ]
    configuration.write_text(
        _CONFIGURATION.format(
            host=host,
            controller_port=ports[0],
            user=subprocess.check_output(["id", "-un"], text=True).strip(),
            root=root,
            nodes="\n".join(lines),
        )
    )
    (root / "state").mkdir()
    path = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
    environment = {**os.environ, "SLURM_CONF": str(configuration), "PATH": path}
    daemons = []
    try:
        for number in range(nodes + 1):
            if number:
                (root / f"spool.n{number}").mkdir()
            command = ["slurmd", "-D", "-N", f"n{number}"] if number else ["slurmctld", "-D", "-i"]
            daemons.append(_daemon([*command, "-f", str(configuration)], environment, root / f"daemon-{number}.log"))
        _wait_until_idle(environment, nodes, root)
        yield environment
    finally:
        subprocess.run(["scancel", "--state=RUNNING"], env=environment, capture_output=True, check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _daemon(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)


def _wait_until_idle(environment: dict[str, str], nodes: int, root: Path) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    command = ["sinfo", "--noheader", "--Node", "--format=%T"]
    while time.monotonic() < deadline:
        states = subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.split()
        if states == ["idle"] * nodes:
            return
        time.sleep(0.2)
    logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(root.glob("*.log")))
    raise RuntimeError(f"the SLURM cluster did not start in {_SECONDS_TO_START} s\n{logs}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
