"""The command lines that a link starts: the ranks of the training step, and one task on every node."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from slurm.local import rank_command, rank_environment
from slurm.request import JobRequest
from slurm.site import Site

# Options of a site's steps that say where a task lives, not how many there are or what they are bound to.
_PLACE = ("--environment", "--container")
# A job's wishes for its own tasks, which contradict those of a step that has tasks of another kind: srun refuses both.
_OF_THE_JOB = ("SLURM_CPUS_PER_TASK", "SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK")


def train_command(site: Site, request: JobRequest, nodes: Sequence[str], log: Path, python: str | None) -> list[str]:
    """Return the command line that starts the ranks of a run.

    Args:
        site: where.
        request: what.
        nodes: names of the nodes to run on; only their number counts at a site without SLURM.
        log: directory of the ranks' output, which must exist; `node-0.log`, `node-1.log`, ... appear in it.
        python: command that runs python on the nodes, as for the shell; None for the site's own.
    """
    command = [*rank_python(site, python), *request.command]
    if site.scheduler == "local":
        return rank_command(request.ranks_per_node, command) if request.ranks_per_node > 1 else command
    return [*_srun(site, request, len(nodes), ",".join(nodes), log), *command]


def shown_step(site: Site, request: JobRequest) -> str:
    """Return the line that starts the ranks, with words in capitals for what is known in the job alone."""
    words = ["mpiexec", "-n", str(request.ranks_per_node)] if request.ranks_per_node > 1 else []
    if site.scheduler != "local":
        words = _srun(site, request, request.nodes, "NODES", Path(request.run_dir) / "jobs" / "JOB" / "LAUNCH")
    return " ".join([*map(shlex.quote, words), site.python or shlex.quote(sys.executable), shlex.join(request.command)])


def _srun(site: Site, request: JobRequest, count: int, nodes: str, log: Path) -> list[str]:
    return [
        "srun",
        f"--nodes={count}",
        f"--nodelist={nodes}",
        f"--ntasks={count * request.ranks_per_node}",
        f"--ntasks-per-node={request.ranks_per_node}",
        *site.srun,
        *_binding(site, request.ranks_per_node),
        "--export=ALL",
        # One dead rank must end the step at once, or the others wait in a collective until the time limit.
        "--kill-on-bad-exit=1",
        "--open-mode=append",
        f"--output={log}/node-%n.log",
    ]


def launcher_log(site: Site, log: Path) -> Path:
    """Return the file for what the launcher itself prints: srun's messages; at `local` the ranks' output too."""
    return log / ("node-0.log" if site.scheduler == "local" else "srun.log")


def step_environment(site: Site, request: JobRequest, nodes: Sequence[str]) -> dict[str, str]:
    """Return the environment of a step: this process's without the job's layout, and what ranks need to meet."""
    local = site.scheduler == "local"
    environment = rank_environment(request.ranks_per_node) if local else dict(os.environ)
    for name in _OF_THE_JOB:
        environment.pop(name, None)
    if site.control == "torch":
        environment["ROOKERY_CONTROL"] = "torch"
        # The ranks know the address of the node that srun runs on, which need not be the step's first.
        if nodes[0] != os.environ.get("SLURMD_NODENAME"):
            environment["MASTER_ADDR"] = nodes[0]
    return environment


def node_command(site: Site, request: JobRequest, nodes: Sequence[str], command: Sequence[str]) -> list[str]:
    """Return the command line that runs `command` once on every node, with all that the job has there."""
    if site.scheduler == "local":
        return list(command)
    return [
        "srun",
        f"--nodes={len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--ntasks={len(nodes)}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={request.ranks_per_node * site.cores_per_rank}",
        "--cpu-bind=none",
        "--mpi=none",
        *(option for option in site.srun if option.startswith(_PLACE)),
        "--export=ALL",
        *command,
    ]


def rank_python(site: Site, python: str | None = None) -> list[str]:
    """Return the command that runs python on the nodes: `python`, else the site's, else this interpreter."""
    command = python or site.python
    return shlex.split(os.path.expandvars(command)) if command else [sys.executable]


def _binding(site: Site, ranks_per_node: int) -> list[str]:
    if site.binding.mode == "slurm":
        return ["--gpus-per-task=1", "--gpu-bind=closest"]
    if site.binding.mode == "mask":
        return [f"--cpu-bind=mask_cpu:{','.join(site.binding.cpu_masks[:ranks_per_node])}"]
    return []
