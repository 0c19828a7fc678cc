"""Runs the command line as users do: on ranks of this machine, through the real MPI launcher."""

from __future__ import annotations

import subprocess
from pathlib import Path

from slurm.local import rank_command, rank_environment
from tests.faults.fork_server import fork_server


def rookery(
    *arguments: str, cwd: Path, ranks: int | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `rookery ARGUMENTS` in `cwd`, on `ranks` ranks under mpiexec or as a single plain process.

    All processes are forked from one that has imported everything, which takes a fourth of the time.
    """
    variables = {**rank_environment(ranks or 1), **(environment or {})}
    if ranks is None:
        return fork_server().command(arguments, cwd, variables)
    return subprocess.run(
        rank_command(ranks, [*forked_python(), "-m", "rookery", *arguments]),
        cwd=cwd,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def forked_python() -> list[str]:
    """Return what a launcher starts in place of `python`: a rank that has imported everything. `-m MODULE` follows."""
    return fork_server().python()
