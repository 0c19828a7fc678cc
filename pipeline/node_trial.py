"""One rank of a trial of a single node: `python -m pipeline.node_trial OUT` writes what the node check found to OUT."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from data_prep.world import World
from monitoring.runlog import write_atomic
from pipeline.errors import ConfigError, ExitCode, UnhealthyNodeError
from pipeline.gloo_control import connect
from pipeline.launch import start_process_group, stop_process_group
from pipeline.node_check import NodeCheckConfig, check_nodes


def main(out: Path) -> int:
    """Be one rank of the trial; the rank that speaks for all writes `out`."""
    world = World.discover(connect)
    try:
        device = start_process_group(world)
        # Only one node: its own files and its own clock say nothing.
        records = check_nodes(NodeCheckConfig(min_free_gb=0.0), world, device, out.parent)
        answer = {"problem": None, "unhealthy": False, "kind": device.type, "devices": records}
        speaks, code = world.rank == 0, ExitCode.FINISHED
    except UnhealthyNodeError as error:
        answer = {"problem": error.reason, "unhealthy": True, "kind": None, "devices": []}
        speaks, code = error.speaks(world.rank), ExitCode.UNHEALTHY_NODE
    except ConfigError as error:  # such as fewer devices than ranks: ill, unless all nodes are like that
        answer = {"problem": str(error), "unhealthy": True, "kind": None, "devices": []}
        speaks, code = world.rank == 0, ExitCode.UNHEALTHY_NODE
    if speaks:
        write_atomic(out, json.dumps(answer).encode())
    if code == ExitCode.FINISHED:
        stop_process_group()
        return code
    sys.stdout.flush()
    os._exit(code)  # others may hang in a collective that this process would wait for at its end


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
