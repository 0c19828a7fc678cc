"""FLOPs of training one sequence to a depth, counted from the shape of the model: matrix products and attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.depth import Depth
    from pipeline.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class SequenceFlops:
    """Forward FLOPs of the parts of a model for one sequence; a product of (m, k) and (k, n) is 2 m k n.

    Norms, activations and other work on single elements are left out, as everywhere where MFU is computed.

    Attributes:
        outside: everything but the loop: prelude, what the injection prepares once, coda, head.
        iteration: one pass through the core.
        state_product: the part of `iteration` that is a product of weights and the incoming state, whose gradient the
            first iteration after the cut does not need.
        recomputes: whether the backward pass repeats each iteration's forward pass.
    """

    outside: float
    iteration: float
    state_product: float
    recomputes: bool

    def forward(self, recurrence: float) -> float:
        """Return the FLOPs of a forward pass with this many iterations."""
        return self.outside + recurrence * self.iteration

    def training(self, depth: Depth) -> float:
        """Return the FLOPs of forward and backward pass; a backward pass is twice its forward pass."""
        with_gradient = 4 if self.recomputes else 3
        return 3 * self.outside + (depth.n + with_gradient * depth.k) * self.iteration - self.state_product


def sequence_flops(
    model: ModelConfig, *, recomputes: bool = False, length: int | None = None, causal: bool = True
) -> SequenceFlops:
    """Return what one sequence costs.

    Args:
        model: the shape.
        recomputes: see `SequenceFlops`; `train.checkpoint_iterations`.
        length: tokens of the sequence; `model.block_size` if None.
        causal: count only the products that the causal mask leaves, half of them; else all, as torch's counter does.
    """
    tokens, width = length or model.block_size, model.n_embd
    weights = 4 * width**2 + 3 * width * model.intermediate_size
    attention = 4 * tokens**2 * width / (2 if causal else 1)
    layer = 2.0 * tokens * weights + attention
    square = 2.0 * tokens * width**2
    prepared = {"concat": square, "diagonal": square}.get(model.injection, 0.0)
    readout = square if model.injection == "diagonal" else 0.0
    state_product = square if model.injection == "concat" else 0.0
    head = 2.0 * tokens * width * model.vocab_size
    return SequenceFlops(
        outside=(model.n_layers_in_prelude + model.n_layers_in_coda) * layer + prepared + readout + head,
        iteration=model.n_layers_in_recurrent_block * layer + state_product,
        state_product=state_product,
        recomputes=recomputes,
    )
