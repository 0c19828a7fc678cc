"""Rotary position embedding over interleaved pairs (arXiv 2104.09864), as the reference model stores it."""

from __future__ import annotations

import torch


def rotary_table(length: int, head_dim: int, base: float, device: torch.device | None = None) -> torch.Tensor:
    """Return cos and sin of position * base^(-2i/head_dim): (1, length, 1, head_dim / 2, 2), float32."""
    # In this order of operations the table equals the reference's bit for bit.
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)[None, :, None]


def apply_rotary(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[2i], x[2i + 1]) of every head by the angle of their position.

    Args:
        x: (batch, sequence, heads, head_dim).
        table: (1, sequence, 1, head_dim / 2, 2) from `rotary_table`, float32.

    Returns:
        Same shape and dtype as `x`; computed in float32.
    """
    if not torch.compiler.is_compiling():
        # The same products and sums in one pass over memory; compilers fuse real arithmetic instead.
        rotated = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.view_as_complex(table)
        return torch.view_as_real(rotated).flatten(-2).type_as(x)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).type_as(x)
