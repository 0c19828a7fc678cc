"""Every optimizer gives the same curve and weights however it is sharded, as in one process without DeepSpeed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.checkpoints.convert import stored_kinds
from pipeline.checkpoints.reader import CheckpointReader, resolve_checkpoint
from pipeline.model import reference_name
from pipeline.optim import build_optimizer
from slurm.local import rank_command, rank_environment
from tests.pipeline.sharded_training import (
    CLIPPING,
    OPTIMIZERS,
    STEPS,
    SUITES,
    Case,
    batch_of,
    batch_size,
    loss_scale_of,
    new_model,
    rate_of,
)
from tests.ranks import forked_python

ROOT = Path(__file__).parents[2]
# Of float32 sums in another order, after 12 steps: of a loss of about 4, and of how far a tensor has moved.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 5e-6, 2e-3
PARAMETERS = sum(parameter.numel() for parameter in new_model(1).parameters())


def launch(suite: str, world: int, local: int, out: Path) -> None:
    done = subprocess.run(
        rank_command(world, [*forked_python(), "-m", "tests.pipeline.sharded_training", str(out), suite]),
        cwd=ROOT,
        env={**rank_environment(world), "LOCAL_WORLD_SIZE": str(local)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@cache
def alone(kind: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses, and the weights after all steps, in a plain loop over whole tensors."""
    model, losses = new_model(seed=1), []
    optimizer = build_optimizer(OPTIMIZERS[kind], model)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step) * group["rate_ratio"]
        loss = model(*batch_of(step, slice(0, batch_size(step))))
        (loss * loss_scale_of(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {reference_name(name): parameter.detach() for name, parameter in model.named_parameters()}


def record_of(out: Path, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return record


def largest_difference(reader: CheckpointReader, kind: str) -> float:
    """The largest difference from the plain loop's weights, in parts of the way that the tensor has gone."""
    start = {reference_name(name): value.detach() for name, value in new_model(seed=1).named_parameters()}
    expected = alone(kind)[1]
    assert reader.manifest.shapes.keys() == expected.keys()
    return max(
        float((reader.weight(name) - weight).abs().max() / (weight - start[name]).abs().max())
        for name, weight in expected.items()
    )


def same_bits(first: CheckpointReader, second: CheckpointReader) -> bool:
    """Whether weights and optimizer state are the same."""
    kinds = stored_kinds(first)
    return kinds == stored_kinds(second) and all(
        torch.equal(*(reader.slice(name, kind, 0, math.prod(shape)) for reader in (first, second)))
        for name, shape in first.manifest.shapes.items()
        for kind in kinds[name]
    )


@pytest.mark.parametrize(("world", "local", "suite"), [(1, 1, "one"), (2, 1, "two"), (4, 2, "four")])
def test_curves_and_weights_do_not_depend_on_stage_scope_or_world_size(
    world: int, local: int, suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(suite, world, local, tmp_path)
    lines = [
        f"\n{world} ranks, {local} a node; without DeepSpeed the loss is {alone('adamw')[0][-1]:.7f}",
        f"{'':60}{'step 1':>11}{'step 10':>11}{'step 12':>11}{'|dloss|':>10}{'|dweight|':>11}",
    ]
    failures = []
    for case in SUITES[suite]:
        line, good = judge(case, tmp_path)
        lines.append(line)
        failures += [] if good else [case.name]
    with capsys.disabled():
        sys.stdout.write("\n".join(lines) + "\n")
    assert not failures
    for case in (case for case in SUITES[suite] if case.resumes is not None):  # what was loaded is what was saved
        loaded, saved = (resolve_checkpoint(tmp_path / f"{name}-half") for name in (case.name, case.resumes))
        assert same_bits(loaded, saved), case.name
    if suite == "two":
        nodes, whole = (record_of(tmp_path, f"bf16-{scope}")["losses"] for scope in ("node", "world"))
        assert nodes == pytest.approx(whole, rel=2e-3)
    if suite == "four":
        check_two_levels(tmp_path)


def judge(case: Case, out: Path) -> tuple[str, bool]:
    """A line of the table, and whether the case is as near to the plain loop, or its model, as it must be."""
    losses = record_of(out, case.name)["losses"]
    if case.same_bits_as is not None:
        other = record_of(out, case.same_bits_as)["losses"]
        first, second = (resolve_checkpoint(out / f"{name}-half") for name in (case.name, case.same_bits_as))
        good = losses == other[: STEPS // 2] and same_bits(first, second)
        words = f"{'' if good else 'NOT '}the bits of {case.same_bits_as}"
        return f"{case.label():60}{losses[0]:11.6f}{losses[-1]:11.6f}  {words}", good
    if case.precision != "fp32":
        line = f"{case.label() + ', ' + case.precision:60}{losses[0]:11.6f}{losses[9]:11.6f}{losses[-1]:11.6f}"
        return line, losses == pytest.approx(alone(case.kind)[0], rel=0.02)
    expected = alone(case.kind)[0][-len(losses) :]
    distance = max(abs(ours - theirs) for ours, theirs in zip(losses, expected, strict=True))
    moved = largest_difference(resolve_checkpoint(out / case.name), case.kind)
    shown = "".join(f"{losses[step]:11.6f}" if len(losses) == STEPS else " " * 11 for step in (0, 9))
    line = f"{case.label():60}{shown}{losses[-1]:11.6f}{distance:10.1e}{moved:11.1e}"
    return line, distance <= LOSS_TOLERANCE and moved <= WEIGHT_TOLERANCE


def check_two_levels(out: Path) -> None:
    for stage in (1, 2, 3):
        record = record_of(out, f"node-{stage}")
        # Before the gradient of the embedding, the last, was complete, others were on their way between nodes.
        assert record["chunks"] > 2
        assert 0 < min(record["begun"][-5:]) < record["chunks"], stage
        # Of the gradient, in float32, each of a node's two ranks sends its half.
        assert record["sent"] / STEPS == pytest.approx(4 / 2 * PARAMETERS, rel=0.01)
    assert set(record_of(out, "waits-1")["begun"]) == {0}
    # Node 0 writes everything, and nobody a second time.
    files = {file for pieces in resolve_checkpoint(out / "node-1").manifest.fragments.values() for file, *_ in pieces}
    assert files == {"shard-00000.safetensors", "shard-00001.safetensors"}
