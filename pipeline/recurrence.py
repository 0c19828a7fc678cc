"""The core, iterated: n times without gradient, then k times with it, for all sequences alike or each its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.blocks import Positions, build_blocks
from pipeline.injection import build_injection
from pipeline.recompute import pass_block, recomputed, selectively_recomputed
from pipeline.trace import Trace

if TYPE_CHECKING:
    from pipeline.model import ModelConfig

Steps = tuple[int, int] | Sequence[tuple[int, int]]
"""Iterations (without, with) gradient: one pair for the whole batch, or one a sequence."""


def steps_of_each(num_steps: Steps, sequences: int) -> list[tuple[int, int]]:
    """Return (n, k) of every sequence of a batch."""
    if isinstance(num_steps[0], int):
        return [cast(tuple[int, int], num_steps)] * sequences
    assert len(num_steps) == sequences
    return list(cast(Sequence[tuple[int, int]], num_steps))


def _deepest(steps: list[tuple[int, int]]) -> int:
    """Return how many sequences are as deep as the deepest."""
    return steps.count(max(steps, key=sum))


class _WithGradient(torch.autograd.Function):
    """The state as it is, but with a gradient, which goes nowhere."""

    @staticmethod
    def forward(ctx: object, state: torch.Tensor, injected: torch.Tensor) -> torch.Tensor:
        return state.clone()

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> tuple[None, None]:
        return None, None


class Recurrence(nn.Module):
    """The core: s_i = blocks(injection(s_(i-1), e)), iterated n times without gradient and then k times with it.

    Attributes:
        compiled: `kept_iterate` compiled (`pipeline.compilation`), if the loop shall use that.
    """

    def __init__(self, config: ModelConfig, attention_backend: str, activation_checkpointing: str) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.adapter = build_injection(config.injection, config.n_embd)
        self.core_block = build_blocks(config.n_layers_in_recurrent_block, config, attention_backend)
        self.compiled: Callable[[torch.Tensor, torch.Tensor, Positions], torch.Tensor] | None = None

    def iterate(self, state: torch.Tensor, injected: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Apply the core once to state (B, S, H); `injected` is what the injection prepared of the prelude's output."""
        state = self.adapter(state, injected)
        for block in self.core_block:
            state = block(state, positions)
        return state

    def kept_iterate(self, state: torch.Tensor, injected: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Do as `iterate`, keeping for the backward pass what `train.activation_checkpointing` says."""
        policy = self.activation_checkpointing if torch.is_grad_enabled() else "none"
        if policy == "iteration":
            return recomputed(self.iterate, state, injected, positions)
        if policy == "selective":
            return selectively_recomputed(self.iterate, state, injected, positions)
        if policy == "block":
            state = self.adapter(state, injected)
            for block in self.core_block:
                state = pass_block(policy, block, state, positions)
            return state
        return self.iterate(state, injected, positions)

    def forward(
        self,
        state: torch.Tensor,
        embedded: torch.Tensor,
        positions: Positions,
        num_steps: Steps,
        trace: Trace | None = None,
        direction: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the state (B, S, H) after n + k iterations, and the squared gain there along `direction` (B,), or 0.

        Gradients reach the last k. Sequences of their own depths are sorted by it and iterated as a prefix that
        shrinks, so that nothing is computed in vain: n and k of a deeper sequence must both be at least those of a
        shallower one. The gain is a matter of this module because ZeRO stage 3 has its weights together only here.
        """
        steps = steps_of_each(num_steps, len(state))
        order = sorted(range(len(steps)), key=lambda sequence: -sum(steps[sequence]))
        if trace is not None:
            trace.begin(state, embedded, order[: _deepest(steps)])
        if order == sorted(order):
            state = self._deepest_first(state, embedded, positions, steps, trace)
        else:
            rows = torch.tensor(order, device=state.device)
            sorted_steps = [steps[sequence] for sequence in order]
            state = self._deepest_first(state[rows], embedded[rows], positions.of(rows), sorted_steps, trace)
            state = state[rows.argsort()]
        if direction is None:
            return state, state.new_zeros(())
        return state, self.squared_gain(state, embedded, positions, direction)

    def _deepest_first(
        self,
        state: torch.Tensor,
        embedded: torch.Tensor,
        positions: Positions,
        steps: list[tuple[int, int]],
        trace: Trace | None,
    ) -> torch.Tensor:
        injected = self.adapter.prepare(embedded)
        deepest = _deepest(steps)
        without, with_gradient = (list(counts) for counts in zip(*steps, strict=True))
        with torch.no_grad():
            state = self._iterate_each(state, injected.detach(), positions, without, deepest, trace)
        # Weights that autocast keeps from iterations without gradient would cut it off in the others (torch < 2.10).
        torch.clear_autocast_cache()
        if self.compiled is not None and injected.requires_grad:
            # The first iteration then is the same graph as the others; it costs one product of the adapter.
            state = cast(torch.Tensor, _WithGradient.apply(state, injected))  # type: ignore[no-untyped-call]
        return self._iterate_each(state, injected, positions, with_gradient, deepest, trace)

    def _iterate_each(
        self,
        state: torch.Tensor,
        injected: torch.Tensor,
        positions: Positions,
        counts: list[int],
        deepest: int,
        trace: Trace | None,
    ) -> torch.Tensor:
        """Iterate sequence b `counts[b]` times, which descend; trace the first `deepest` sequences."""
        assert counts == sorted(counts, reverse=True)
        step = self.compiled or self.kept_iterate
        finished: list[torch.Tensor] = []
        for iteration in range(1, counts[0] + 1):
            active = sum(count >= iteration for count in counts)
            if active < len(state):
                finished.append(state[active:])
                # Compiled code tells views from tensors of their own, and would have a graph for each.
                prefix = slice(active) if self.compiled is None else torch.arange(active, device=state.device)
                state, injected, positions = state[prefix], injected[prefix], positions.of(prefix)
            before = state
            state = step(state, injected, positions)
            if trace is not None:
                trace.record(before[:deepest], state[:deepest])
        return torch.cat([state, *reversed(finished)]) if finished else state

    def squared_gain(
        self, state: torch.Tensor, embedded: torch.Tensor, positions: Positions, direction: torch.Tensor
    ) -> torch.Tensor:
        """Return |v^T J|^2 of every sequence (B,), float32, J the Jacobian of one iteration at `state`.

        v is `direction` (B, S, H) after one step of power iteration, v^T J normalised. Vector-Jacobian products
        alone: fused attention has no forward mode, and no second derivative either, so it is computed unfused here.
        The state is taken as given; the gradient of the result reaches the core's parameters and `embedded`.
        """
        state = state.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            image = self.iterate(state, self.adapter.prepare(embedded), positions)
            (pulled,) = torch.autograd.grad(image, state, direction.type_as(image), retain_graph=True)
            norm = torch.linalg.vector_norm(pulled.float(), dim=(1, 2), keepdim=True).clamp_min(1e-12)
            direction = (pulled.float() / norm).type_as(image)
            (pulled,) = torch.autograd.grad(image, state, direction, create_graph=True)
        return pulled.float().square().sum((1, 2))
