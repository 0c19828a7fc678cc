"""Arrays of independent tasks, submitted through Submitit: to SLURM, or as processes of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slurm.limits import allot, parse_duration
from slurm.site import Site, account
from slurm.submission import flag_or_text, module_lines, only_the_script, refusals

if TYPE_CHECKING:
    from submitit import Job

_MINUTES = 720


class ArrayError(ValueError):
    """An array cannot be submitted, or one of its tasks has failed."""


def submit_array(
    commands: Sequence[Sequence[str]], folder: Path, name: str, site: Site | None, sbatch: Mapping[str, str]
) -> list[Job[None]]:
    """Submit one task a command; they may run at any time and in any order.

    Args:
        commands: what each task runs, the same for all but for the number of the task.
        folder: directory for the logs of the tasks; must be seen by every node.
        name: name of the job.
        site: whose queues, account and modules are used; at one without SLURM all tasks are processes of this machine
            that start now. None for a bare SLURM, of which nothing is known.
        sbatch: long options of `sbatch` without their dashes, over those of the site.

    Returns:
        One job a task, in order.

    Raises:
        ArrayError: there is no SLURM here.
        SiteError: the site does not grant it; with the nearest value that it would.
        SubmissionError: SLURM refuses the job; with its reason.
    """
    from submitit import LocalExecutor, SlurmExecutor

    options = dict(sbatch)
    text = options.pop("time", None)
    minutes = None if text is None else parse_duration(text)
    if site is not None and site.scheduler == "local":
        local = LocalExecutor(folder=folder)
        local.update_parameters(timeout_min=minutes or _MINUTES)
        return local.map_array(_run, commands)
    setup: list[str] = []
    if site is not None:
        granted = allot(site, 1, minutes, options.pop("partition", None), options.pop("qos", None))
        own = {"account": account(site, options.pop("account", None), os.environ)}
        own |= {"partition": granted.partition, "qos": granted.qos}
        options = {**site.sbatch, **{key: value for key, value in own.items() if value is not None}, **options}
        minutes, setup = granted.minutes, module_lines(site)
    if shutil.which("sbatch") is None:
        raise ArrayError("no sbatch found: run this where SLURM is, or choose --site local")
    executor = SlurmExecutor(folder=folder)
    parameters = {key.replace("-", "_"): flag_or_text(value) for key, value in options.items()}
    executor.update_parameters(job_name=name, time=minutes or _MINUTES, setup=setup, additional_parameters=parameters)
    executor.parameters["wckey"] = None  # Submitit's own may be refused
    with only_the_script(), refusals(name):
        return executor.map_array(_run, commands)


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
