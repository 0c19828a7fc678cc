"""The optimizers and which parameters they treat how."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from pipeline.ellis_adam import EllisAdam
from pipeline.errors import ConfigError
from pipeline.model import decays, reference_name
from pipeline.muon import Muon
from pipeline.sharding import Whole

KINDS = ("adamw", "ellis_adam", "muon")
# Their rows are looked up one by one, so that they are lists of vectors and not matrices that act on something.
_TABLES = ("transformer.wte.weight", "lm_head.weight")


@dataclass(kw_only=True)
class MuonConfig:
    """What `optimizer.kind: muon` does with matrices; all else is AdamW with the keys of `optimizer`."""

    learning_rate: float | None = None
    """Peak learning rate of the matrices; optimizer.learning_rate if null."""
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    """Iterations that make the momentum orthogonal."""
    tensors: list[str] = field(default_factory=list)
    """Names or patterns (`transformer.core_block.*.weight`) of its matrices; empty for all but embedding and head."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        if self.learning_rate is not None and self.learning_rate <= 0.0:
            raise ConfigError(f"optimizer.muon.learning_rate: {self.learning_rate} is not positive")
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"optimizer.muon.momentum: {self.momentum} is not in [0, 1)")
        if self.newton_schulz_steps < 1:
            raise ConfigError(f"optimizer.muon.newton_schulz_steps: {self.newton_schulz_steps} is not positive")


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer; its update is the same at every ZeRO stage and world size."""

    kind: str = "adamw"
    """adamw, ellis_adam (that of Huginn-0125), or muon (AdamW for all but matrices)."""
    learning_rate: float
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    """Keeps the division finite; ellis_adam floors its second moment at the square (1e-6 in the reference)."""
    weight_decay: float = 1e-4
    """Never applied to norms and biases."""
    decoupled_weight_decay: bool = False
    """A step shrinks weights by weight_decay times the share of the peak learning rate, as in the reference, or else
    times the learning rate."""
    gradient_clipping: float = 1.0
    """Largest global L2 norm of the gradient; 0 disables clipping."""
    muon: MuonConfig = field(default_factory=MuonConfig)

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        if self.kind not in KINDS:
            raise ConfigError(f"optimizer.kind: {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.learning_rate <= 0.0:
            raise ConfigError(f"optimizer.learning_rate: {self.learning_rate} is not positive")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"optimizer.{name}: {getattr(self, name)} is not in [0, 1)")
        for name in ("eps", "weight_decay", "gradient_clipping"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name}: {getattr(self, name)} is negative")
        if self.kind == "ellis_adam" and self.eps == 0.0:
            raise ConfigError("optimizer.eps: ellis_adam divides by a second moment floored at eps^2; use 1e-6")
        if self.kind != "muon" and self.muon != MuonConfig():
            raise ConfigError(f"optimizer.muon: has no effect with optimizer.kind = {self.kind}; use kind=muon")


def check_optimizer(config: OptimizerConfig, model: nn.Module) -> None:
    """Refuse what the optimizer cannot do with the parameters of `model`, which may be on the meta device.

    Raises:
        ConfigError: optimizer.muon.tensors names nothing, or something that is not a matrix.
    """
    if config.kind == "muon":
        _muon_names(config.muon, model)


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters of `model`, before DeepSpeed shards them.

    Every parameter group holds `rate_ratio`, its peak rate over optimizer.learning_rate, for
    `pipeline.engine.set_learning_rate`.

    Raises:
        ConfigError: see `check_optimizer`.
    """
    tensors = [(_whole(name, parameter), parameter) for name, parameter in model.named_parameters()]
    betas: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.kind == "ellis_adam":
        # One group, so that one all-reduce a step carries the statistics of all tensors.
        return EllisAdam([_group(config, tensors, EllisAdam.STATE) | betas])
    if config.kind == "muon":
        names = _muon_names(config.muon, model)
        matrices = [tensor for tensor in tensors if tensor[0].name in names]
        others = [tensor for tensor in tensors if tensor[0].name not in names]
        rule = {"momentum": config.muon.momentum, "newton_schulz_steps": config.muon.newton_schulz_steps}
        peak = config.muon.learning_rate or config.learning_rate
        return Muon(
            [_group(config, matrices, Muon.STATE, peak) | rule, _group(config, others, Muon.ADAM_STATE) | betas]
        )
    decayed = [tensor for tensor in tensors if tensor[0].decays]
    plain = [tensor for tensor in tensors if not tensor[0].decays]
    # Element by element, so that it may work on DeepSpeed's flat partitions as they are.
    groups = [_group(config, decayed, EllisAdam.STATE), _group(config, plain, EllisAdam.STATE) | {"weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=True, **betas)


def _whole(name: str, parameter: nn.Parameter) -> Whole:
    return Whole(name=reference_name(name), shape=parameter.shape, decays=decays(name, parameter))


def _group(
    config: OptimizerConfig,
    tensors: list[tuple[Whole, nn.Parameter]],
    state_names: tuple[str, ...],
    peak: float | None = None,
) -> dict[str, Any]:
    """Return a parameter group at its peak rate; all rules shrink weights by 1 - lr x weight_decay."""
    peak = peak or config.learning_rate
    decay = config.weight_decay / peak if config.decoupled_weight_decay else config.weight_decay
    return {
        "params": [parameter for _, parameter in tensors],
        "tensors": [whole for whole, _ in tensors],
        "state_names": state_names,
        "lr": peak,
        "rate_ratio": peak / config.learning_rate,
        "weight_decay": decay,
    }


def _muon_names(config: MuonConfig, model: nn.Module) -> set[str]:
    """Return the reference's names of Muon's matrices."""
    shapes = {reference_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    chosen = {name for name, shape in shapes.items() if len(shape) == 2 and name not in _TABLES}
    if config.tensors:
        chosen = set()
    for pattern in config.tensors:
        found = {name for name in shapes if fnmatchcase(name, pattern)}
        for name in sorted(found):
            if len(shapes[name]) != 2:
                raise ConfigError(
                    f"optimizer.muon.tensors: {pattern!r} names {name} of shape {shapes[name]}, but Muon makes matrices"
                    " orthogonal; name 2-d tensors only, the others are left to AdamW"
                )
        if not found:
            raise ConfigError(f"optimizer.muon.tensors: {pattern!r} names no tensor of the model")
        chosen |= found
    return chosen
