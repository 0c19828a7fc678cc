"""Activation checkpointing: what of the blocks the backward pass computes again instead of keeping it.

Non-reentrant only: reentrant checkpointing fires the gradient hooks of a weight at every use, and the core's weights
are used in every iteration, so that DeepSpeed would reduce them several times or refuse. Iterations are the core's
alone; blocks are those of prelude and coda too, which would be most of what is kept otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

POLICIES = ("none", "iteration", "block", "selective")
"""none keeps everything, iteration and block their inputs, selective the results of matrix products and attention."""

# By name, since a build lacks the operators of the others: linear layers; attention as
# `scaled_dot_product_attention` dispatches it (CPU, flash, memory-efficient, cuDNN, other devices; unfused it is two
# `bmm`); flash-attn's own.
_KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "flash_attn::_flash_attn_forward",
    }
)


def recomputed(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """Call `function`, keeping its arguments alone for the backward pass, which calls it again.

    It must draw no random numbers: the generators' states are not kept.
    """
    output: torch.Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return output


def selectively_recomputed(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """Call `function` like `recomputed`, but keep the results of matrix products and attention too."""
    output: torch.Tensor = checkpoint(
        function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=_selective_contexts
    )
    return output


def pass_block(policy: str, block: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """Call a block of the prelude, the core or the coda, keeping what `policy` says of a block by itself."""
    if torch.is_grad_enabled():
        if policy == "block":
            return recomputed(block, *arguments)
        if policy == "selective":
            return selectively_recomputed(block, *arguments)
    return block(*arguments)


def _policy(context: SelectiveCheckpointContext, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_selective_contexts: Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]
_selective_contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
