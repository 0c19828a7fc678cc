"""How the prelude's output e enters every iteration: the first thing that the core does with its state s.

Each kind has a part that does not change in the loop, which `prepare` computes once. Shapes: (B, S, H).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ConcatInjection(nn.Module):
    """A [s; e] with a learned A (H, 2 H), the adapter of the reference (arXiv 2502.05171, section 3.2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 2 * width))

    def prepare(self, embedded: torch.Tensor) -> torch.Tensor:
        """Return the adapter's half that acts on e."""
        return F.linear(embedded, self.weight[:, embedded.shape[-1] :])

    def forward(self, state: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        """Return the core's input."""
        return F.linear(state, self.weight[:, : state.shape[-1]]) + prepared


class AddInjection(nn.Module):
    """s + e."""

    def prepare(self, embedded: torch.Tensor) -> torch.Tensor:
        """Return e."""
        return embedded

    def forward(self, state: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        """Return the core's input."""
        return state + prepared


class GateInjection(AddInjection):
    """s * e, element by element, as the reference's option of that name."""

    def forward(self, state: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        """Return the core's input."""
        return state * prepared


class DiagonalInjection(nn.Module):
    """a * s + d * B e with a = exp(-d exp(A_log)) in (0, 1), d = softplus(delta) (Parcae, arXiv 2604.12946).

    The linear part of the loop cannot grow, whatever is learned: a diverging loop learns a spectral radius above 1.
    B begins as the identity, a as 1/2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(width))
        self.delta = nn.Parameter(torch.zeros(width))
        self.weight = nn.Parameter(torch.eye(width))

    def decay(self) -> torch.Tensor:
        """Return a (H,), float32: in bf16 it would round to 1."""
        return torch.exp(-F.softplus(self.delta.float()) * self.A_log.float().exp())

    def prepare(self, embedded: torch.Tensor) -> torch.Tensor:
        """Return what e adds in every iteration."""
        return F.linear(embedded, self.weight) * F.softplus(self.delta).type_as(embedded)

    def forward(self, state: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        """Return the core's input."""
        return (state.float() * self.decay()).type_as(state) + prepared


Injection = ConcatInjection | AddInjection | DiagonalInjection


def build_injection(kind: str, width: int) -> Injection:
    """Return the injection that `model.injection` names."""
    if kind == "add":
        return AddInjection()
    if kind == "gate":
        return GateInjection()
    return ConcatInjection(width) if kind == "concat" else DiagonalInjection(width)
