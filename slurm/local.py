"""Starts ranks on this machine through the MPI launcher, as a site's `srun` starts them on its nodes."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

# A rank that inherits these from a launcher around us would believe to belong to that launcher's world.
_LAUNCHER_PREFIXES = ("PMI_", "PMIX_", "OMPI_", "PALS_", "MV2_", "SLURM_", "HYDI_", "HYDRA_", "MPIR_", "TORCHELASTIC_")
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LauncherError(ValueError):
    """No MPI launcher can be found."""


def find_mpiexec() -> str:
    """Return the launcher that belongs to this environment's MPI, else the first on PATH.

    Raises:
        LauncherError: there is none.
    """
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.is_file() else shutil.which("mpiexec")
    if found is None:
        raise LauncherError("no mpiexec found: load the site's MPI module, or install the extra `rookery[mpi]`")
    return found


def rank_command(ranks: int, command: list[str]) -> list[str]:
    """Return the command line that runs `command` on `ranks` ranks of this machine."""
    return [find_mpiexec(), "-n", str(ranks), *command]


def rank_environment(ranks: int) -> dict[str, str]:
    """Return this process's environment for `ranks` ranks: no other launcher's traces, the cores divided among them."""
    cores = max(1, len(os.sched_getaffinity(0)) // ranks)
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LAUNCHER_PREFIXES) and name not in _LAUNCHER_VARIABLES
    }
    # Threads that spin while they wait take the cores from other ranks.
    return {"OMP_WAIT_POLICY": "passive", **clean, "OMP_NUM_THREADS": str(cores)}
