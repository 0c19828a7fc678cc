"""The layers of prelude, core and coda. Shapes: B batch, S sequence, H width (`n_embd`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kernels.attention import causal_attention
from kernels.rms_norm import RMSNorm
from kernels.rotary import apply_rotary

if TYPE_CHECKING:
    from pipeline.model import ModelConfig


class Positions(NamedTuple):
    """Where the tokens of a batch stand, and which of them see each other.

    Attributes:
        rotary: (1, S, 1, head_dim / 2, 2). Attention sees distances alone, so documents need no table of their own.
        mask: (B, 1, S, S), true where a query sees a key; None where that is causality alone.
    """

    rotary: torch.Tensor
    mask: torch.Tensor | None = None

    def of(self, sequences: slice | torch.Tensor) -> Positions:
        """Return the positions of some sequences of the batch."""
        return self if self.mask is None else Positions(self.rotary, self.mask[sequences])


def document_mask(documents: torch.Tensor) -> torch.Tensor:
    """Return the mask (B, 1, S, S) of positions that see those before them in their own document.

    Args:
        documents: (B, S) integers, the number of each position's document.
    """
    causal = torch.ones(2 * documents.shape[1:], dtype=torch.bool, device=documents.device).tril()
    return (causal & (documents[:, :, None] == documents[:, None, :]))[:, None]


class CausalSelfAttention(nn.Module):
    """Multi-head attention with a learned bias on queries and keys, added before the rotary embedding."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.heads, self.head_dim, self.backend = config.n_heads, config.head_dim, backend
        self.Wqkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, config.n_heads, config.head_dim))
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Attend over x (B, S, H); same shape."""
        query, key, value = (part.unflatten(-1, (self.heads, self.head_dim)) for part in self.Wqkv(x).chunk(3, -1))
        query_bias, key_bias = self.qk_bias.type_as(query).unbind(0)
        query = apply_rotary(query + query_bias, positions.rotary)
        key = apply_rotary(key + key_bias, positions.rotary)
        heads = causal_attention(query, key, value, self.backend, positions.mask)
        attended: torch.Tensor = self.proj(heads.flatten(-2))
        return attended


class GatedMLP(nn.Module):
    """silu(a) * b with a and b from one fused projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, S, H) to the same shape."""
        gate, up = self.fc(x).chunk(2, -1)
        projected: torch.Tensor = self.proj(F.silu(gate) * up)
        return projected


class SandwichBlock(nn.Module):
    """A block whose residual stream is normalised after each sub-layer: x = n2(x + Attn(n1(x))); n4(x + MLP(n3(x))).

    So the norms pin the scale of the state (arXiv 2502.05171, section 3.2); `learned` gives them their weights.
    """

    def __init__(self, config: ModelConfig, attention_backend: str, *, learned: bool = True) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps, learned=learned)
        self.attn = CausalSelfAttention(config, attention_backend)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps, learned=learned)
        self.norm_3 = RMSNorm(config.n_embd, config.norm_eps, learned=learned)
        self.mlp = GatedMLP(config)
        self.norm_4 = RMSNorm(config.n_embd, config.norm_eps, learned=learned)

    def forward(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Map x (B, S, H) to the same shape."""
        x = self.norm_2(x + self.attn(self.norm_1(x), positions))
        x = self.norm_4(x + self.mlp(self.norm_3(x)))
        return x


class PreNormBlock(nn.Module):
    """The usual block, whose residual stream is never normalised: x = x + Attn(n1(x)); x + MLP(n2(x))."""

    def __init__(self, config: ModelConfig, attention_backend: str) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config, attention_backend)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Map x (B, S, H) to the same shape."""
        x = x + self.attn(self.norm_1(x), positions)
        x = x + self.mlp(self.norm_2(x))
        return x


def build_blocks(number: int, config: ModelConfig, attention_backend: str) -> nn.ModuleList:
    """Return `number` blocks of the kind that `model.block` names."""
    if config.block == "pre_norm":
        return nn.ModuleList(PreNormBlock(config, attention_backend) for _ in range(number))
    learned = config.block == "sandwich"
    return nn.ModuleList(SandwichBlock(config, attention_backend, learned=learned) for _ in range(number))
