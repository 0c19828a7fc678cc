"""Numbers that say how well the recurrence works, as functions of a state.

Shapes: B sequences, S tokens, H width. All arithmetic is float32 and needs no gradient; no function waits for the
device. `pipeline.trace` applies them to what a forward pass did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

RANK_TOKENS = 256
# Iterations over which the contraction is measured; before them the state is still on its way from the noise.
_FIRST, _LAST = 4, 12
_TINY = 1e-12


def rms(x: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of all elements."""
    x = x.detach().float()
    norm: torch.Tensor = torch.linalg.vector_norm(x)
    return norm / math.sqrt(x.numel())


def mean_norm(x: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of the Euclidean norm of x (B, S, H)."""
    norms: torch.Tensor = torch.linalg.vector_norm(x.detach().float(), dim=-1)
    return norms.mean()


def token_correlation(x: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine between the tokens of a sequence, less 1 / S; x is (B, S, H).

    Every token's vector is centred before. That is 0 for unrelated tokens and 1 - 1 / S where all are the same: the
    collapse of arXiv 2502.05171, section 4.3, whose reference makes the S x S matrix of cosines. The mean over all
    pairs, each token's with itself among them, is the square of the mean unit vector, in O(S H). A token whose vector
    is constant has no direction and counts as unrelated.
    """
    x = x.detach().float()
    x = x - x.mean(dim=-1, keepdim=True)
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_TINY)
    # One product instead of a division that writes all unit vectors.
    mean = torch.einsum("bsh,bs->bh", x, lengths.squeeze(-1).reciprocal()) / x.shape[1]
    return mean.square().sum(dim=-1).mean() - 1.0 / x.shape[1]


def gram(x: torch.Tensor) -> torch.Tensor:
    """Return the inner products of at most 256 tokens of x (B, S, H), or of their columns if H is smaller.

    The tokens are those of the first sequence, evenly spaced. Both matrices have the squared singular values of these
    tokens' vectors for eigenvalues, of which `effective_rank` is made.
    """
    tokens = x.shape[1]
    rows = x[0].detach()
    if tokens > RANK_TOKENS:
        rows = rows[torch.arange(RANK_TOKENS, device=x.device) * tokens // RANK_TOKENS]
    rows = rows.float()
    return rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows


def effective_rank(products: torch.Tensor) -> float:
    """Return exp of the entropy of the shares sigma^2 / sum sigma^2 (Roy and Vetterli, EUSIPCO 2007, with squares).

    It lies between 1, where all tokens point the same way, and their number. The vectors are not centred: what they
    have in common is what shows a collapse. nan for a state that is zero or not finite.

    Args:
        products: of `gram`. Waits for the device, and computes on the host, where it holds no queue up.
    """
    products = products.cpu()
    if not bool(torch.isfinite(products).all()):
        return math.nan
    squares = torch.linalg.eigvalsh(products).double().clamp_min(0.0)
    total = squares.sum()
    if not float(total) > 0.0:
        return math.nan
    shares = squares / total
    return math.exp(float(torch.special.entr(shares).sum()))


def contraction(changes: Sequence[float], floor: float = 0.0) -> float | None:
    """Return the geometric mean of |D_(i+1)| / |D_i| over iterations 4 to 12, D_i = s_i - s_(i-1).

    None for fewer than 3 of them. Above 1 successive changes grow, which precedes a collapse; inf for a state that is
    not finite, 0 at a fixed point.

    Args:
        changes: |D_i| of every iteration, from 1 on, in any unit.
        floor: changes up to this are rounding, whose ratio says nothing: the mean ends with the first of those that
            come last.
    """
    measured = list(changes)[_FIRST - 1 : _LAST]
    if len(measured) < 3:
        return None
    if not all(math.isfinite(change) for change in measured):
        return math.inf
    above = [index for index, change in enumerate(measured) if change > floor]
    if not above:
        return 0.0
    last = max(1, min(above[-1] + 1, len(measured) - 1))
    if measured[0] <= 0.0 or measured[last] <= 0.0:
        return 0.0
    return math.exp(math.log(measured[last] / measured[0]) / last)
