"""A trial of one node alone, on all of its devices: memory, matrix product and all-reduce, before it gets any work.

Its ranks are processes of `python -m pipeline.node_trial OUT`, as many as the node has devices.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slurm.local import rank_environment

_SECONDS = 300.0
_SECONDS_AFTER_A_FAILURE = 10.0
_SECONDS_BETWEEN = 0.05
_CHARACTERS_SHOWN = 300


def try_node(ranks: int, python: Sequence[str] = (sys.executable,), *, seconds: float = _SECONDS) -> dict[str, Any]:
    """Try all devices of this node.

    Args:
        ranks: number of processes, one a device.
        python: command that runs python.
        seconds: limit of the whole trial.

    Returns:
        `problem`: what is wrong, None if all is well; `unhealthy`: whether the node is to blame for it, and not how
        this was started; `kind`: of the devices, None if that was not found out; `devices`: one record a rank as
        `pipeline.node_check.check_nodes` returns them.
    """
    place = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    environment = rank_environment(ranks) | {name: str(value) for name, value in place.items()}
    environment |= {"ROOKERY_CONTROL": "torch", "GLOO_SOCKET_IFNAME": "lo"}
    if node := os.environ.get("SLURMD_NODENAME"):  # what the queue calls this host
        environment["SLURMD_NODENAME"] = node
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "trial.json"
        started = []
        for rank in range(ranks):
            with (Path(folder) / f"rank-{rank}.log").open("wb") as log:
                own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [*python, "-m", "pipeline.node_trial", str(out)]
                started.append(subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        in_time = _wait(started, seconds)
        if out.exists():
            answer: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return answer
        if not in_time:
            return _verdict(f"the trial of its devices did not end within {seconds:.0f} s", unhealthy=True)
        return _verdict(f"the trial of its devices broke: {_last_words(Path(folder))}", unhealthy=False)


def _wait(started: Sequence[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Wait until all have ended; end them when the time is up, or soon after one has failed, for which others wait."""
    deadline = time.monotonic() + seconds
    failed = False
    while None in (ends := [process.poll() for process in started]) and time.monotonic() < deadline:
        if not failed and any(ends):
            failed = True
            deadline = min(deadline, time.monotonic() + _SECONDS_AFTER_A_FAILURE)
        time.sleep(_SECONDS_BETWEEN)
    in_time = failed or None not in ends
    for process in started:
        process.kill()
        process.wait()
    return in_time


def _last_words(folder: Path) -> str:
    said = [path.read_text(encoding="utf-8", errors="replace").strip() for path in sorted(folder.glob("rank-*.log"))]
    return next((text.splitlines()[-1][:_CHARACTERS_SHOWN] for text in said if text), "no rank said why")


def _verdict(problem: str, *, unhealthy: bool) -> dict[str, Any]:
    return {"problem": problem, "unhealthy": unhealthy, "kind": None, "devices": []}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
