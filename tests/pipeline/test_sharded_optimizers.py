"""Every optimizer gives the same weights at every ZeRO stage and world size as in one process without DeepSpeed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.checkpoint import resolve_checkpoint
from pipeline.model import reference_name
from pipeline.optim import build_optimizer
from slurm.local import rank_command, rank_environment
from tests.pipeline.sharded_training import (
    CLIPPING,
    OPTIMIZERS,
    RESUMED,
    RESUMED_WORLD,
    STAGES,
    STEPS,
    batch_of,
    batch_size,
    loss_scale_of,
    new_model,
    rate_of,
)

ROOT = Path(__file__).parents[2]


def alone(kind: str) -> dict[str, torch.Tensor]:
    """The weights after all steps in a plain loop over whole tensors."""
    model = new_model(seed=1)
    optimizer = build_optimizer(OPTIMIZERS[kind], model)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step) * group["rate_ratio"]
        (model(*batch_of(step, slice(0, batch_size(step)))) * loss_scale_of(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
    return {reference_name(name): parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_updates_do_not_depend_on_stage_world_size_or_a_resume_at_another_stage(world: int, tmp_path: Path) -> None:
    done = subprocess.run(
        rank_command(world, [sys.executable, "-m", "tests.pipeline.sharded_training", str(tmp_path)]),
        cwd=ROOT,
        env=rank_environment(world),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    start = {reference_name(name): value.detach() for name, value in new_model(seed=1).named_parameters()}
    for kind in OPTIMIZERS:
        expected = alone(kind)
        for stage in STAGES:
            resumed = stage in RESUMED and world == RESUMED_WORLD
            for way in ("straight", "resumed") if resumed else ("straight",):
                reader = resolve_checkpoint(tmp_path / f"{kind}-{stage}-{way}")
                assert reader.manifest.shapes.keys() == expected.keys()
                for name, weight in expected.items():
                    moved = (weight - start[name]).abs().max()
                    difference = (reader.weight(name) - weight).abs().max()
                    assert difference <= 3e-3 * moved, f"{kind}, stage {stage}, {way}: {name} {difference} of {moved}"
