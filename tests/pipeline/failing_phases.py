"""Run by test_failures on every rank: one rank breaks in one phase after the other, and all must end together.

    mpiexec -n WORLD python -m tests.pipeline.failing_phases CONFIG OUT

Every phase but the last ends with an exception on every rank, whose text goes to OUT/PHASE-RANK. The last one breaks
in the middle of a step, where the others wait in a collective, and ends all processes. OUT/PHASE-broke is made when
the rank breaks.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pipeline.checkpoints.reader
import pipeline.checkpoints.shard
import pipeline.loader
import pipeline.step
import pipeline.validation
from data_prep.world import PeerError, World
from pipeline.config import load_config
from pipeline.train import train
from rookery.cli import main as rookery

BROKEN = 2
OVERRIDES = {
    "data": ["objective.goldfish=4"],  # the ranks meet before the first backward pass
    "eval": ["validation={every: 1, depths: [1], budget: 1.0}"],
}
# What is broken, and after how many calls.
PHASES: dict[str, tuple[Any, str, int]] = {
    "open": (pipeline.loader.TrainingData, "check_shards", 0),
    "data": (pipeline.loader.Loader, "micro_batches", 2),
    "save": (pipeline.checkpoints.shard.Snapshot, "take", 0),
    "load": (pipeline.checkpoints.reader.CheckpointReader, "read", 5),
    "eval": (pipeline.validation.Validation, "_batches", 0),
    "forward": (pipeline.step.Stepper, "_forward", 2),
}


def broken(phase: str, world: World, out: Path) -> AbstractContextManager[object]:
    """Break the phase on one rank, which notes when it happens."""
    place, name, good_calls = PHASES[phase]
    whole, calls = getattr(place, name), 0

    def breaks(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > good_calls:
            (out / f"{phase}-broke").touch()
            raise OSError(f"{phase} broke on purpose")
        return whole(*args, **kwargs)

    return patch.object(place, name, breaks) if world.rank == BROKEN else nullcontext()


def main(config: str, out: Path) -> int:
    world = World.discover()
    for phase in list(PHASES)[:-1]:
        if phase == "load":
            train(load_config(config, ["train.steps=4", "schedule.cooldown_steps=0"]), world)
        said = "nothing"
        with broken(phase, world, out), suppress(PeerError, OSError):
            try:
                train(load_config(config, OVERRIDES.get(phase, [])), world)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                raise
        world.failed_together = False
        (out / f"{phase}-{world.rank}").write_text(said)
    sys.argv = ["rookery", "train", config]
    with broken("forward", world, out):
        return rookery()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
