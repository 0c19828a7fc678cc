"""What is minimised: the cross-entropy of the next token, and options around it, all off by default."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.noise import mix
from pipeline.errors import ConfigError
from pipeline.loader import IGNORED
from pipeline.recurrence import Steps, steps_of_each


@dataclass(kw_only=True)
class ObjectiveConfig:
    """Terms and weights of the loss."""

    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's denominator, which keeps the logits from drifting."""
    label_smoothing: float = 0.0
    """Part of the target's probability that is spread over the whole vocabulary."""
    goldfish: int = 0
    """Leave one token in this many out of the loss, chosen by the tokens before it; 0 for none."""
    goldfish_context: int = 13
    """Number of preceding tokens that choose, so that a repeated passage always lacks the same tokens."""
    divide_by_backprop_depth: bool = False
    """Divide each sequence's loss by its iterations with gradient, so that deep steps do not weigh more."""
    jacobian_penalty: float = 0.0
    """Weight of the squared gain of one more iteration at the last state, which keeps the loop contracting."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name in ("z_loss", "jacobian_penalty"):
            if getattr(self, name) < 0.0:
                raise ConfigError(f"objective.{name}: {getattr(self, name)} is negative")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(f"objective.label_smoothing: {self.label_smoothing} is not in [0, 1)")
        if self.goldfish < 0 or self.goldfish == 1:
            raise ConfigError(
                f"objective.goldfish: {self.goldfish} would leave no token to train on; use 2 or more, or 0 for none"
            )
        if self.goldfish_context < 1:
            raise ConfigError(f"objective.goldfish_context: {self.goldfish_context} is not positive")

    @property
    def is_cross_entropy(self) -> bool:
        """Whether `loss` is the mean cross-entropy and nothing else."""
        return not (self.z_loss or self.label_smoothing or self.divide_by_backprop_depth)


def loss(logits: torch.Tensor, labels: torch.Tensor, config: ObjectiveConfig, num_steps: Steps) -> torch.Tensor:
    """Return the mean objective over the labels that count; 0 if none does.

    Args:
        logits: (B, S, V) float32.
        labels: (B, S) int64, `IGNORED` where nothing is trained on.
        config: z-loss (arXiv 2204.02311, section 5), label smoothing and the division by k ("throttle" in the
            reference); goldfish is `goldfish_labels`, the Jacobian's penalty is the model's.
        num_steps: iterations (without, with) gradient, of the batch or of each sequence.
    """
    counts = labels != IGNORED
    each = F.cross_entropy(
        logits.flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=config.label_smoothing,
    ).view(labels.shape)
    if config.z_loss:
        each = each + config.z_loss * logits.logsumexp(-1).square() * counts
    if config.divide_by_backprop_depth:
        depths = torch.tensor([max(k, 1) for _, k in steps_of_each(num_steps, len(labels))], device=each.device)
        each = each / depths[:, None]
    return each.sum() / counts.sum().clamp_min(1)


def goldfish_labels(labels: torch.Tensor, input_ids: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """Return the labels with one in `config.goldfish` set to `IGNORED` (arXiv 2406.10209).

    Whether a token is left out is a hash of the `goldfish_context` tokens before it, so a passage that occurs twice
    lacks the same tokens and cannot be learned by heart. The first tokens of a row, which lack the context, stay.

    Args:
        labels: (B, S) int64; labels[:, i] follows input_ids[:, i].
        input_ids: (B, S) int64.
        config: unchanged labels are returned if `goldfish` is 0.
    """
    if config.goldfish == 0 or labels.shape[1] < config.goldfish_context:
        return labels
    context = input_ids.unfold(1, config.goldfish_context, 1)
    hashed = torch.ones_like(context[..., 0])
    for token in context.unbind(-1):
        hashed = mix(hashed ^ token)
    dropped = torch.zeros_like(labels, dtype=torch.bool)
    dropped[:, config.goldfish_context - 1 :] = hashed % config.goldfish == 0
    return labels.masked_fill(dropped, IGNORED)
