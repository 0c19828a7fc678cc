"""Run on every rank by tests: measures the updates of a tiny model by all ways of sharding.

    mpiexec -n WORLD python -m tests.pipeline.probed_updates OUT

LOCAL_WORLD_SIZE says which ranks are a node. OUT/NAME.json holds what each case's probe read after its last step, and
every rank's digest of the gradients of the first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed

from data_prep.world import World
from pipeline import update_probe
from pipeline.gradient_digest import GradientDigest
from pipeline.launch import start_process_group, stop_process_group
from pipeline.update_probe import UpdateProbe
from tests.pipeline.sharded_training import Case, Run

STEPS = 4
SAMPLE = 100  # fewer than the larger tensors have
CASES = [
    *(Case(name=f"world-{stage}", stage=stage) for stage in range(4)),
    *(Case(name=f"node-{stage}", stage=stage, scope="node") for stage in (0, 1, 3)),
    Case(name="ellis_adam-2", stage=2, kind="ellis_adam"),
    Case(name="muon-1", stage=1, kind="muon"),
    Case(name="bf16-1", stage=1, precision="bf16"),
]


def main(out: Path) -> None:
    update_probe.SAMPLE = SAMPLE
    world = World.discover()
    start_process_group(world)
    for case in CASES:
        run = Run(case, world)
        digest = GradientDigest(run.engine.module)
        run.train(range(1))
        digests = [found.hex() for found, _ in world.allgather(digest.read())]
        probe = UpdateProbe(run.engine, world)
        assert probe.read() == {}
        run.train(range(1, STEPS - 1))
        assert probe.read() == {}  # nobody armed it
        run.engine.rookery_gate.arm(None, probe)
        run.train(range(STEPS - 1, STEPS))
        read = probe.read()
        assert probe.read() == {}
        (out / f"{case.name}-{world.rank}.json").write_text(json.dumps({"read": read, "digests": digests}))
        levels = run.engine.rookery_levels
        for group in () if levels is None else (levels.node, levels.between):
            torch.distributed.destroy_process_group(group)
    stop_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
