"""Causal self-attention behind one function, on PyTorch's fused kernel or on flash-attn where it is installed."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

BACKENDS = ("sdpa", "flash")


def backend_problem(backend: str) -> str | None:
    """Return why `backend` cannot be used here, or None when it can."""
    if backend not in BACKENDS:
        return f"unknown attention backend {backend!r}; choose one of {', '.join(BACKENDS)}"
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed; install the extra `rookery[flash-attn]` or use sdpa"
    return None


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    backend: str = "sdpa",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from every position to itself and the positions before it, scaled by 1/sqrt(head_dim).

    Args:
        query: (batch, sequence, heads, head_dim), as `key` and `value`.
        key: see `query`.
        value: see `query`.
        backend: "sdpa" (any device) or "flash" (fp16 or bf16 on a GPU; knows no mask).
        mask: (batch, 1, sequence, sequence), true where a query sees a key, in place of causality.

    Returns:
        (batch, sequence, heads, head_dim), same dtype.
    """
    if backend == "flash":
        assert mask is None
        from flash_attn import flash_attn_func

        output: torch.Tensor = flash_attn_func(query, key, value, causal=True)
        return output
    transposed = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, is_causal=mask is None
    )
    return transposed.transpose(1, 2)
