"""Run by test_recovery on two ranks: gradients of rank 1 that are not finite, once, always, or three steps long.

    mpiexec -n 2 python -m tests.pipeline.broken_gradients CONFIG

Each run leaves its directory, named after what was broken and the ZeRO stage, and its exit code in the file `code`.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch

import pipeline.step
from data_prep.world import World
from pipeline.config import load_config
from pipeline.journal import journal
from pipeline.train import train

BROKEN = 1
# Steps whose gradient is broken on that rank, and how many of the computations of such a step.
FAULTS: dict[str, tuple[set[int], int]] = {
    "clean": (set(), 0),
    "transient": ({6}, 1),
    "always": ({6}, 99),
    "thrice": ({6, 7, 8}, 3),
}
RUNS = [("clean", 1), ("transient", 1), ("always", 0), ("always", 1), ("always", 2), ("always", 3), ("thrice", 1)]


class _Broken(torch.autograd.Function):
    """A loss as it is, whose gradient is none."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("nan")


def breaking(fault: str, world: World) -> AbstractContextManager[object]:
    """Break the gradients of one rank."""
    steps, times = FAULTS[fault]
    whole, done = pipeline.step.Stepper._forward, Counter[int]()

    def forward(*args: Any) -> torch.Tensor:
        loss: torch.Tensor = whole(*args)
        number = journal.standing().step
        if world.rank != BROKEN or number not in steps or done[number] >= 2 * times:
            return loss
        done[number] += 1  # two micro-batches a step
        return cast(torch.Tensor, _Broken.apply(loss))  # type: ignore[no-untyped-call]

    return patch.object(pipeline.step.Stepper, "_forward", forward)


def main(config: str) -> None:
    world = World.discover()
    for fault, stage in RUNS:
        name = f"{fault}-{stage}"
        with breaking(fault, world):
            code, reason = train(load_config(config, [f"run_dir={name}", f"zero.stage={stage}"]), world)
        if world.rank == 0:
            (Path(name) / "code").write_text(f"{int(code)} {reason}")


if __name__ == "__main__":
    main(sys.argv[1])
