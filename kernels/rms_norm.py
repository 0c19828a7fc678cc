"""Root-mean-square normalisation (arXiv 1910.07467) with the reference model's order of casts."""

from __future__ import annotations

import torch
from torch import nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; without the weight unless it is `learned`.

    The mean is taken in float32 and the result is cast back *before* the weight is applied: in bf16 another order
    gives other numbers, and exported weights must mean the same elsewhere.
    """

    def __init__(self, width: int, eps: float, *, learned: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if learned else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x (..., width); same shape and dtype."""
        wide = x.float()
        normalised = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)
        return normalised if self.weight is None else normalised * self.weight
