"""Root-mean-square normalisation (arXiv 1910.07467) with the reference model's order of casts."""

from __future__ import annotations

from typing import Any

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
        if torch.compiler.is_compiling():
            normalised = (x.float() * _inverse_rms(x, self.eps)).type_as(x)  # fused by the compiler, both ways
        else:
            normalised = _Normalise.apply(x, self.eps)  # type: ignore[no-untyped-call]
        return normalised if self.weight is None else normalised * self.weight


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


class _Normalise(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps), which keeps x and one number a row where autograd would keep float32 copies of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, eps: float) -> torch.Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, inverse)
        return (x.float() * inverse).type_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # differentiated once more: the inverse depends on x, too
            inverse = _inverse_rms(x, ctx.eps)
        gradient, normalised = gradients[0].float(), x.float() * inverse
        along = (gradient * normalised).mean(-1, keepdim=True)
        return ((gradient - normalised * along) * inverse).type_as(x), None
