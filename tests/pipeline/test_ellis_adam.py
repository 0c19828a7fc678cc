"""ELLISAdam against the reference's own numbers (tests/golden/ellis_adam)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.ellis_adam import EllisAdam
from pipeline.optim import OptimizerConfig, build_optimizer
from pipeline.sharding import Whole

GOLDEN = Path(__file__).parents[1] / "golden" / "ellis_adam" / "trajectory.safetensors"
NAMES = ("matrix", "vector", "big")


def optimizer_of(parameters: dict[str, nn.Parameter]) -> EllisAdam:
    config = OptimizerConfig(
        kind="ellis_adam", learning_rate=4e-2, eps=1e-6, weight_decay=1e-2, decoupled_weight_decay=True
    )
    module = nn.Module()
    for name, parameter in parameters.items():
        module.register_parameter(name, parameter)
    optimizer = build_optimizer(config, module)
    assert isinstance(optimizer, EllisAdam)
    return optimizer


def test_six_steps_follow_the_reference() -> None:
    golden = load_file(GOLDEN)
    parameters = {name: nn.Parameter(golden[f"param.0.{name}"].clone()) for name in NAMES}
    optimizer = optimizer_of(parameters)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = float(golden["lr"][step])
        for name, parameter in parameters.items():
            parameter.grad = golden[f"grad.{step}.{name}"].clone()
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.data, golden[f"param.{step + 1}.{name}"], rtol=0.0, atol=1e-6)


def test_a_gradient_that_jumps_moves_the_weights_no_further_than_the_clipped_rate() -> None:
    """Update clipping is per tensor: a jump in one tensor leaves the other's step as it is."""
    steps = {}
    for jump in (1.0, 1000.0):
        parameters = {name: nn.Parameter(torch.zeros(4, 4)) for name in ("a", "b")}
        optimizer = optimizer_of(parameters)
        before: dict[str, torch.Tensor] = {}
        for scale in (1.0, 1.0, jump):
            before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            parameters["a"].grad, parameters["b"].grad = torch.full((4, 4), scale), torch.ones(4, 4)
            optimizer.step()
        steps[jump] = {name: (parameter.detach() - before[name]).abs().max() for name, parameter in parameters.items()}
    assert torch.equal(steps[1.0]["b"], steps[1000.0]["b"])
    # v is 5 % of the jump's square: g^2 / v is 20, and the rate is divided by sqrt(20).
    assert steps[1000.0]["a"] < steps[1.0]["a"] / 2


def test_tensors_without_a_piece_here_are_left_to_other_ranks() -> None:
    parameter = nn.Parameter(torch.ones(4))
    whole = Whole(name="a", shape=torch.Size([4]), decays=False)
    group = {"params": [parameter], "tensors": [whole], "state_names": EllisAdam.STATE, "lr": 1.0, "weight_decay": 0.0}
    optimizer = EllisAdam([group | {"betas": (0.9, 0.95), "eps": 1e-6}])
    optimizer.place({}, None)
    optimizer.step()
    assert torch.equal(parameter.data, torch.ones(4))
