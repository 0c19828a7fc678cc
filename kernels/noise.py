"""Counter-based noise: every number is a hash of (key, position, channel), so it does not depend on who asks.

The same key gives the same noise under recomputation, replay and any world size or micro-batch split, without any
generator state to save. Integer arithmetic makes the underlying uniforms identical on every device; the normals
agree up to the device's `erfinv`.
"""

from __future__ import annotations

import math

import torch

_MASK = 0xFFFFFFFF
TRUNCATION = 3.0  # standard deviations, as the reference


def mix(x: torch.Tensor) -> torch.Tensor:
    """Hash 32-bit integers held in int64 (the "lowbias32" mixer, C. Wellons 2018: bias 0.17)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def truncated_normal(keys: torch.Tensor, rows: int, columns: int, std: float) -> torch.Tensor:
    """Draw from a normal truncated at 3 standard deviations, one matrix a key.

    Args:
        keys: (batch,) int64, non-negative; all 63 bits count.
        rows: number of rows (positions) of each matrix.
        columns: number of columns (channels).
        std: standard deviation before truncation.

    Returns:
        (batch, rows, columns) float32 on the device of `keys`.
    """
    device = keys.device
    row = torch.arange(rows, device=device)
    column = torch.arange(columns, device=device)
    key = mix((mix(keys & _MASK) + (keys >> 32)) & _MASK)
    # Hash one coordinate at a time: a single counter would overflow 32 bits at 2^32 numbers a key.
    at_row = mix((key[:, None] + row * 0x9E3779B9) & _MASK)
    bits = mix((at_row[:, :, None] ^ column * 0x85EBCA6B) & _MASK)
    # 23 bits, centred: exact in float32 and never 0 or 1.
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    limit = math.erf(TRUNCATION / math.sqrt(2.0))
    return torch.erfinv((2.0 * uniform - 1.0) * limit) * (std * math.sqrt(2.0))
