"""The optimizer and its learning-rate schedule, both functions of the step alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.errors import ConfigError


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW with a trapezoidal learning rate: linear warm-up, constant, linear cooldown to zero."""

    learning_rate: float
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-4
    """Multiplied by the learning rate; never applied to norms and biases."""
    gradient_clipping: float = 1.0
    """Largest global L2 norm of the gradient; 0 disables clipping."""
    warmup_steps: int = 0
    cooldown_steps: int = 0
    """Steps at the end of the run over which the learning rate falls to zero."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        if self.learning_rate <= 0.0:
            raise ConfigError(f"optimizer.learning_rate: {self.learning_rate} is not positive")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"optimizer.{name}: {getattr(self, name)} is not in [0, 1)")
        for name in ("eps", "weight_decay", "gradient_clipping", "warmup_steps", "cooldown_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name}: {getattr(self, name)} is negative")


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of `step` (from 0) in a run of `total_steps`."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    cooldown = min(1.0, (total_steps - step) / (config.cooldown_steps + 1))
    return config.learning_rate * min(warmup, cooldown)


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW over two groups: matrices with weight decay, norms and biases without."""
    named = list(model.named_parameters())
    plain = [parameter for name, parameter in named if parameter.dim() < 2 or name.endswith("bias")]
    matrices = [parameter for name, parameter in named if not (parameter.dim() < 2 or name.endswith("bias"))]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
