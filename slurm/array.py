"""Arrays of independent tasks, submitted through Submitit: to SLURM, or as processes of this machine."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from submitit import Job

CLUSTERS = ("slurm", "local")
_MINUTES = 720


class ArrayError(ValueError):
    """An array cannot be submitted, or one of its tasks has failed."""


def submit_array(
    commands: Sequence[Sequence[str]], folder: Path, name: str, cluster: str, sbatch: Mapping[str, str]
) -> list[Job[None]]:
    """Submit one task a command; they may run at any time and in any order.

    Args:
        commands: what each task runs, the same for all but for the number of the task.
        folder: directory for the logs of the tasks; must be seen by every node.
        name: name of the job.
        cluster: "slurm", or "local" for processes of this machine that all start now.
        sbatch: long options of `sbatch` without their dashes; `time` in minutes. Ignored by "local".

    Returns:
        One job a task, in order.

    Raises:
        ArrayError: there is no SLURM here, or it refuses the job; with its reason.
    """
    from submitit import LocalExecutor, SlurmExecutor
    from submitit.core.utils import FailedJobError

    if cluster not in CLUSTERS:
        raise ArrayError(f"--cluster {cluster}: is not one of {', '.join(CLUSTERS)}")
    options = {key.replace("-", "_"): value for key, value in sbatch.items()}
    minutes = options.pop("time", str(_MINUTES))
    if not minutes.isdecimal() or int(minutes) < 1:
        raise ArrayError(f"--sbatch time={minutes}: should be a number of minutes")
    if cluster == "local":
        local = LocalExecutor(folder=folder)
        local.update_parameters(timeout_min=int(minutes))
        return local.map_array(_run, commands)
    if shutil.which("sbatch") is None:
        raise ArrayError("no sbatch found: run this where SLURM is, or choose --cluster local")
    executor = SlurmExecutor(folder=folder)
    executor.update_parameters(job_name=name, time=int(minutes), additional_parameters=options)
    try:
        return executor.map_array(_run, commands)
    except FailedJobError as error:
        raise ArrayError(f"{name}: SLURM refuses the job: {' '.join(str(error).split())}") from error


def wait_for(jobs: Sequence[Job[None]]) -> None:
    """Wait until all tasks have ended.

    Raises:
        ArrayError: one of them has failed; with the end of what it said.
    """
    failed = [job for job in jobs if job.exception() is not None]
    if failed:
        said = (failed[0].stderr() or "").strip().splitlines()
        message = next((line for line in reversed(said) if line.startswith("rookery: ")), "it left no message")
        raise ArrayError(
            f"{len(failed)} of {len(jobs)} tasks failed, the first with: {message.removeprefix('rookery: ')}"
            f" ({failed[0].paths.stderr}); mend that and start the same command again"
        )


def _run(command: Sequence[str]) -> None:
    """Run the command of a task; SLURM shall see that it failed."""
    subprocess.run(command, check=True)
