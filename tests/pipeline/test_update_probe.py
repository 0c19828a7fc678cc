"""What is measured of an update is the same however it is sharded: that of whole tensors, written out."""

from __future__ import annotations

import json
import math
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.model import reference_name
from pipeline.optim import build_optimizer
from pipeline.update_probe import effective_rates, squared_ratios
from slurm.local import rank_command, rank_environment
from tests.pipeline.probed_updates import CASES, SAMPLE, STEPS
from tests.pipeline.sharded_training import (
    CLIPPING,
    OPTIMIZERS,
    batch_of,
    batch_size,
    loss_scale_of,
    new_model,
    rate_of,
)
from tests.ranks import forked_python

ROOT = Path(__file__).parents[2]


@cache
def expected(kind: str) -> dict[str, Any]:
    """The last update of a plain loop over whole tensors, by the definitions."""
    model = new_model(seed=1)
    optimizer = build_optimizer(OPTIMIZERS[kind], model)
    tensors = {reference_name(name): value for name, value in model.named_parameters()}
    before: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        before = {name: value.detach().double().clone() for name, value in tensors.items()}
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step) * group["rate_ratio"]
        (model(*batch_of(step, slice(0, batch_size(step)))) * loss_scale_of(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
    eps = OPTIMIZERS[kind].eps
    record: dict[str, dict[str, float]] = {
        name: {} for name in ("optimizer_rms", "effective_rate", "update_ratio", "gradient_share")
    }
    squares = {}
    for name, value in tensors.items():
        assert value.grad is not None
        gradient, weight = value.grad.double().flatten(), value.detach().double().flatten()
        sample = slice(None, None, math.ceil(len(weight) / SAMPLE))
        squares[name] = float(gradient.square().sum())
        change = (weight - before[name].flatten())[sample]
        record["update_ratio"][name] = float(change.norm() / weight[sample].norm())
        state = {key: moment.double().flatten() for key, moment in optimizer.state[value].items() if key != "step"}
        if "exp_avg_sq" in state:
            floored = state["exp_avg_sq"].clamp(min=eps**2)
            record["optimizer_rms"][name] = float((gradient.square() / floored).mean().sqrt())
            divisor = torch.where(gradient.abs() > eps, gradient, eps)
            rates = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + eps) / divisor
            record["effective_rate"][name] = float(rates[sample].mean())
    parts = {"embedding": "wte", "prelude": "prelude", "adapter": "adapter", "core": "core_block", "coda": "ln_f"}
    for part, word in parts.items():
        record["gradient_share"][part] = sum(x for name, x in squares.items() if word in name) / sum(squares.values())

    def norm(word: str, *, within: bool) -> float:
        return math.sqrt(
            sum(float(x.detach().double().square().sum()) for n, x in tensors.items() if (word in n) == within)
        )

    record["weight_norm"] = {
        "core": norm("core_block", within=True),
        "embedding": norm("wte", within=True),
        "model": norm("wte", within=False),
    }
    return record


def test_sums_over_a_tensor_are_those_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient, mean, square = (torch.randn(2**20 + 999, generator=generator) for _ in range(3))
    gradient[::1000], square = 1e-9, square.square() * 1e-3
    square[::500] = 0.0
    floored = square.double().clamp(min=1e-6)
    assert float(squared_ratios(gradient, square, 1e-3)) == pytest.approx(
        float((gradient.double().square() / floored).sum()), rel=1e-4
    )
    divisor = torch.where(gradient.abs() > 1e-3, gradient, 1e-3).double()
    expected_rate = float((mean.double() / (square.double().sqrt() + 1e-3) / divisor).abs().sum())
    assert float(effective_rates(mean.abs(), square, divisor.abs().float(), 1e-3)) == pytest.approx(
        expected_rate, rel=1e-4
    )
    signed = effective_rates(torch.ones(4), torch.ones(4), torch.tensor([2.0, -2.0, 1e-5, -1e-5]), 1e-3)
    assert float(signed) == pytest.approx((0.5 - 0.5 + 1e3 + 1e3) / 1.001, rel=1e-6)


def test_updates_measure_the_same_at_every_stage_and_scope(tmp_path: Path) -> None:
    done = subprocess.run(
        rank_command(2, [*forked_python(), "-m", "tests.pipeline.probed_updates", str(tmp_path)]),
        cwd=ROOT,
        env={**rank_environment(2), "LOCAL_WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first_digests = None
    for case in CASES:
        record, other = (json.loads((tmp_path / f"{case.name}-{rank}.json").read_text()) for rank in range(2))
        assert record == other
        tolerance = 1e-3 if case.precision == "fp32" else 0.2
        wanted = expected(case.kind)
        assert record["read"].keys() == wanted.keys(), case.name
        for name, values in wanted.items():
            if name == "effective_rate":  # a gradient near 0 decides it
                assert record["read"][name].keys() == values.keys()
                continue
            assert record["read"][name] == pytest.approx(values, rel=tolerance), (case.name, name)
        assert sum(record["read"]["gradient_share"].values()) == pytest.approx(1.0)
        # Each rank's gradients are its own, before they are reduced, and so the same whatever is done with them.
        assert record["digests"][0] != record["digests"][1]
        if case.precision == "fp32" and case.kind == "adamw":
            first_digests = first_digests or record["digests"]
            assert record["digests"] == first_digests, case.name
