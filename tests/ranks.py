"""Runs the command line as users do: on ranks of this machine, through the real MPI launcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from slurm.local import rank_command, rank_environment


def rookery(
    *arguments: str, cwd: Path, ranks: int | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `rookery ARGUMENTS` in `cwd`, on `ranks` ranks under mpiexec or as a single plain process."""
    command = [sys.executable, "-m", "rookery", *arguments]
    return subprocess.run(
        command if ranks is None else rank_command(ranks, command),
        cwd=cwd,
        env={**rank_environment(ranks or 1), **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
