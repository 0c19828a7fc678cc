"""Steps of two ranks, of which rank 1 takes half as long again; rank 0 writes what the pace says of them."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from data_prep.world import World
from pipeline.pace import Pace
from pipeline.timing import StepClock

SLOWER = 1.5
STEPS = 16


def main() -> None:
    """Do the steps; each ends when both ranks have done it."""
    world, clock = World.discover(), StepClock(torch.device("cpu"))
    os.environ["SLURMD_NODENAME"] = f"n{world.rank}"
    pace, depths, durations = Pace(world), np.random.default_rng(0).integers(1, 9, (STEPS, 2)), []
    for n, k in depths.tolist():
        world.sum(np.ones(1))
        started = time.perf_counter()
        with clock("forward"):
            time.sleep((2.0 + 0.5 * n + 1.0 * k) * 1e-3 * (SLOWER if world.rank == 1 else 1.0))
        world.sum(np.ones(1))
        durations.append(time.perf_counter() - started)
        pace.add(1, n, k, clock.read()["forward"])
    found, totals = pace.read(), world.gather(sum(durations))
    if world.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps({"found": found, "seconds": totals}))
    else:
        assert found == {}


if __name__ == "__main__":
    main()
