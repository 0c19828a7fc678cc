"""FLOPs of training one sequence to a depth, counted from the shape of the model: matrix products and attention."""

from __future__ import annotations

from collections.abc import Sequence
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
        recomputed: what the backward pass of an iteration repeats of it (`train.activation_checkpointing`).
        recomputed_outside: what it repeats of prelude and coda.
    """

    outside: float
    iteration: float
    state_product: float
    recomputed: float
    recomputed_outside: float

    def forward(self, recurrence: float) -> float:
        """Return the FLOPs of a forward pass with this many iterations."""
        return self.outside + recurrence * self.iteration

    def model(self, depth: Depth) -> float:
        """Return the FLOPs that the definition of the model asks for; a backward pass is twice its forward pass."""
        return 3 * self.outside + (depth.n + 3 * depth.k) * self.iteration - self.state_product

    def training(self, depth: Depth) -> float:
        """Return the FLOPs that the hardware does: those of the model, and what is computed again."""
        return self.model(depth) + depth.k * self.recomputed + self.recomputed_outside

    def mean(self, depths: Sequence[Depth]) -> tuple[float, float]:
        """Return the means of `model` and `training` over `depths`."""
        n, k = (sum(counts) / len(depths) for counts in zip(*depths, strict=True))
        model = 3 * self.outside + (n + 3 * k) * self.iteration - self.state_product
        return model, model + k * self.recomputed + self.recomputed_outside


def sequence_flops(
    model: ModelConfig, activation_checkpointing: str = "none", *, length: int | None = None, causal: bool = True
) -> SequenceFlops:
    """Return what one sequence costs.

    Args:
        model: the shape.
        activation_checkpointing: as `train.activation_checkpointing`; `iteration` repeats the core, `block` its blocks
            and those of prelude and coda, `selective` no product.
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
    core = model.n_layers_in_recurrent_block * layer
    others = (model.n_layers_in_prelude + model.n_layers_in_coda) * layer
    return SequenceFlops(
        outside=others + prepared + readout + head,
        iteration=core + state_product,
        state_product=state_product,
        recomputed={"iteration": core + state_product, "block": core}.get(activation_checkpointing, 0.0),
        recomputed_outside=others if activation_checkpointing == "block" else 0.0,
    )
