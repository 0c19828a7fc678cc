"""Which nodes of a job pass a check before the ranks start, where the job has more than it needs.

`python -m slurm.spares FOLDER RANKS` is that check on one node.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from monitoring.runlog import Record, write_atomic
from slurm.node_trial import try_node
from slurm.request import JobRequest
from slurm.site import Site
from slurm.steps import node_command, rank_python, step_environment

SECONDS = 600.0
"""After which a node that has not answered has failed: importing PyTorch from a slow file system takes minutes."""

Run = Callable[[Sequence[str], Mapping[str, str], Path, Callable[[], None]], int | None]


class CheckError(RuntimeError):
    """The check of the nodes says nothing about them; the message says why."""


def check_nodes(
    site: Site, request: JobRequest, nodes: Sequence[str], python: str | None, folder: Path, run: Run
) -> dict[str, str]:
    """Try the devices of every node, and return node -> what is wrong with it.

    Args:
        site: where.
        request: says how many of the nodes are needed.
        nodes: to try.
        python: command that runs python on the nodes; None for the site's own.
        folder: directory for what the nodes say, which must exist and be empty.
        run: runs a command with an environment and a log, calling something meanwhile.

    Raises:
        CheckError: too few nodes answered, or none is good: the fault is not theirs.
        OSError: the check cannot be started.
    """
    trial = [*rank_python(site, python), "-m", "slurm.spares", str(folder), str(request.ranks_per_node)]
    command = node_command(site, request, nodes, trial)
    deadline = time.monotonic() + SECONDS

    def between() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    with suppress(TimeoutError):
        run(command, step_environment(site, request, nodes), folder / "check.log", between)
    return problems({node: _read(folder / f"{node}.json") for node in nodes}, request.nodes)


def problems(answers: Mapping[str, Record | None], needed: int) -> dict[str, str]:
    """Return node -> what is wrong with it.

    Args:
        answers: node -> what its check says, None if it says nothing.
        needed: number of good nodes that the run needs.

    Raises:
        CheckError: so many nodes say nothing, or all fail, that the check is to blame, or what they share.
    """
    silent = [node for node, answer in answers.items() if answer is None]
    if len(silent) > len(answers) - needed:
        raise CheckError(f"{len(silent)} of {len(answers)} nodes gave no answer, the first of them {silent[0]}")
    bad = {
        node: "no answer from the check of its devices" if answer is None else str(answer.get("problem"))
        for node, answer in answers.items()
        if answer is None or answer.get("unhealthy")
    }
    if len(bad) == len(answers) > 1:
        node, reason = next((node, reason) for node, reason in bad.items() if node not in silent)
        raise CheckError(f"all {len(bad)} nodes fail, {node} with: {reason}")
    return bad


def _read(path: Path) -> Record | None:
    try:
        answer = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def main(folder: Path, ranks: int) -> None:
    """Try the devices of this node, and leave the answer in a file that is named like it."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    write_atomic(folder / f"{node}.json", json.dumps(try_node(ranks)).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
