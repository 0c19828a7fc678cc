"""Which parameters decay and by how much, and what the optimizer's configuration refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.model import RecurrentDepthModel
from pipeline.optim import MuonConfig, OptimizerConfig, build_optimizer


def test_norms_and_biases_do_not_decay() -> None:
    config = load_config("smoke")
    model = RecurrentDepthModel(config.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = build_optimizer(config.optimizer, model).param_groups
    assert decayed["weight_decay"] == config.optimizer.weight_decay
    assert plain["weight_decay"] == 0.0
    assert {names[id(parameter)].split(".")[-1] for parameter in decayed["params"]} == {"weight"}
    assert all("norm" in name or "ln_f" in name or "bias" in name for name in (names[id(p)] for p in plain["params"]))
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


@pytest.mark.parametrize("kind", ["adamw", "ellis_adam", "muon"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_decay_is_a_share_of_the_rate_or_of_the_schedule_alone(kind: str, decoupled: bool) -> None:
    """Without a gradient only decay moves a weight."""
    module = nn.Module()
    module.matrix, module.vector = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))
    config = OptimizerConfig(kind=kind, learning_rate=0.5, weight_decay=0.1, decoupled_weight_decay=decoupled, eps=1e-6)
    optimizer = build_optimizer(config, module)
    for group in optimizer.param_groups:
        group["lr"] = 0.25 * group["rate_ratio"]  # half of the peak
    module.matrix.grad, module.vector.grad = torch.zeros(3, 4), torch.zeros(4)
    optimizer.step()
    shrunk = 1.0 - (0.5 * 0.1 if decoupled else 0.25 * 0.1)
    torch.testing.assert_close(module.matrix.detach(), torch.full((3, 4), shrunk))
    assert torch.equal(module.vector.detach(), torch.ones(4))


def test_what_an_optimizer_would_not_use_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.muon: has no effect with optimizer.kind = adamw"):
        OptimizerConfig(learning_rate=1.0, muon=MuonConfig(momentum=0.9))


@pytest.mark.parametrize(
    "change", [{"learning_rate": 0.0}, {"beta2": 1.0}, {"kind": "sgd"}, {"gradient_clipping": -0.1}]
)
def test_values_outside_their_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.{next(iter(change))}"):
        OptimizerConfig(**{"learning_rate": 1.0, **change})  # type: ignore[arg-type]
