"""The learning rate over a run, and which parameters decay."""

from __future__ import annotations

import pytest

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.model import RecurrentDepthModel
from pipeline.optim import OptimizerConfig, build_optimizer, learning_rate


def test_the_rate_rises_stays_and_falls() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=3, cooldown_steps=4)
    rates = [learning_rate(config, step, 12) for step in range(12)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_without_warm_up_and_cooldown_the_rate_is_constant() -> None:
    assert {learning_rate(OptimizerConfig(learning_rate=0.5), step, 7) for step in range(7)} == {0.5}


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


@pytest.mark.parametrize(
    "change", [{"learning_rate": 0.0}, {"beta2": 1.0}, {"warmup_steps": -1}, {"gradient_clipping": -0.1}]
)
def test_values_outside_their_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.{next(iter(change))}"):
        OptimizerConfig(**{"learning_rate": 1.0, **change})  # type: ignore[arg-type]
