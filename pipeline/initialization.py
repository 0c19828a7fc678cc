"""The first value of every parameter, a function of its name and its key alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from kernels.noise import truncated_normal

if TYPE_CHECKING:
    from pipeline.model import ModelConfig

INITS = ("takase", "scaled")


def standard_deviation(config: ModelConfig, name: str, mean_recurrence: float) -> float:
    """Return the standard deviation, before the cut at 3 of it, of the matrix of this name.

    sqrt(2 / (5 H)), and 1 / sqrt(2 l) of it for the projections back into the residual stream. `model.init` says what
    l counts: "takase" (arXiv 2312.16903, as arXiv 2502.05171, section 4.1, applies it) the blocks that a token passes,
    each iteration of the core anew, "scaled" (GPT-2's rule) the blocks that there are.
    """
    deviation = math.sqrt(2 / (5 * config.n_embd))
    if not name.endswith("proj.weight"):
        return deviation
    layers = config.effective_depth(mean_recurrence if config.init == "takase" else 1)
    return deviation / math.sqrt(2 * layers)


@torch.no_grad()
def initialize(parameter: torch.Tensor, config: ModelConfig, name: str, mean_recurrence: float, key: int) -> None:
    """Set a parameter to its first value: matrices to noise of `key`, norms to 1, biases and the decay's rates to 0.

    The square matrices of the diagonal injection (its B, and the readout) begin as the identity.
    """
    if name.endswith(("qk_bias", "adapter.A_log", "adapter.delta")):
        parameter.zero_()
    elif parameter.dim() == 1:
        parameter.fill_(1.0)
    elif name.endswith("readout.weight") or (name.endswith("adapter.weight") and config.injection == "diagonal"):
        torch.nn.init.eye_(parameter)
    else:
        keys = torch.tensor([key], device=parameter.device)
        rows, columns = parameter.shape
        parameter.copy_(truncated_normal(keys, rows, columns, standard_deviation(config, name, mean_recurrence))[0])
