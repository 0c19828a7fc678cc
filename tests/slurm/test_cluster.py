"""The cluster of the tests itself: what it kills is dead, what it heals works, and it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_programs

ROOT = Path(__file__).parents[2]


def processes_of(configuration: str) -> list[str]:
    """The command lines of all processes that were started for a cluster, apart from this one."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and f"SLURM_CONF={configuration}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def sleepers(cluster: Cluster) -> int:
    """The number of tasks that `test_a_killed_node_is_dead_and_can_be_healed` has on all nodes."""
    return sum(line.split()[:1] == ["/usr/bin/sleep"] for line in processes_of(cluster.environment["SLURM_CONF"]))


def test_a_killed_node_is_dead_and_can_be_healed(cluster: Cluster) -> None:
    step = "srun --output=none /usr/bin/sleep 3333"
    cluster.sh("sbatch", "--nodes=2", "--nodelist=n1,n2", "--output=/dev/null", "--wrap", step)
    deadline = time.monotonic() + 30
    while sleepers(cluster) < 2:
        assert time.monotonic() < deadline, cluster.sh("squeue")
        time.sleep(0.05)
    cluster.kill_node("n2")
    left = processes_of(cluster.environment["SLURM_CONF"])
    assert sleepers(cluster) == 1, left
    assert not any(" -N n2 " in line for line in left)
    cluster.heal()
    assert cluster.states() == {"n1": "idle", "n2": "idle", "n3": "idle"}
    assert cluster.sh("srun", "--nodelist=n2", "printenv", "SLURMD_NODENAME") == "n2\n"
    assert cluster.sh("squeue", "--noheader") == ""


@pytest.mark.skipif(bool(missing_programs()), reason="SLURM is not installed; Debian: slurm-wlm")
def test_a_killed_test_run_leaves_no_process_behind(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from tests.slurm.cluster import Cluster\n"
        "with Cluster(Path(sys.argv[1]), nodes=1) as cluster:\n"
        "    cluster.sh('sbatch', '--output=/dev/null', '--wrap', 'setsid sleep 3333')\n"
        "    print(flush=True); time.sleep(60)"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert killed.stdout is not None
    assert killed.stdout.readline() == b"\n"
    configuration = str(tmp_path / "slurm.conf")
    assert any("slurmctld" in line for line in processes_of(configuration))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    deadline = time.monotonic() + 10
    while left := processes_of(configuration):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
