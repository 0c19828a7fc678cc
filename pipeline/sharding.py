"""Optimizers whose rules need whole tensors, over shards that cut them.

DeepSpeed flattens a parameter group and gives every rank an equal range of it (ZeRO 1 and 2), or cuts every tensor in
equal parts (ZeRO 3); its optimizers see flat vectors. `ShardedOptimizer` is told afterwards where the pieces of every
tensor lie (`place`), so that a subclass can reduce its statistics over the ranks and give the same update as a single
process, up to the order of float32 sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A tensor as the model knows it.

    Attributes:
        name: the reference's name.
        shape: its whole shape.
        decays: whether weight decay applies to it.
    """

    name: str
    shape: torch.Size
    decays: bool


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The contiguous piece of a tensor that this rank works on.

    Attributes:
        flat: the optimizer's parameter that holds it.
        offset: first element of the piece in `flat`.
        start: first element of the piece in the flattened tensor.
        numel: number of elements.
    """

    flat: torch.Tensor
    offset: int
    start: int
    numel: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the piece (numel,) of a tensor that is laid out as `flat`, as a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


@dataclass(frozen=True, kw_only=True)
class Views:
    """What one update works on: views (numel,) of a piece.

    Attributes:
        index: number of the tensor in its group.
        whole: the tensor.
        piece: where the views lie.
        weight: float32 weights.
        gradient: gradient, averaged and clipped.
        state: name -> optimizer state.
    """

    index: int
    whole: Whole
    piece: Piece
    weight: torch.Tensor
    gradient: torch.Tensor
    state: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Sharers:
    """The ranks among which tensors are cut.

    Attributes:
        group: their process group.
        name: what the journal calls it.
        device: where their messages must be; pieces may lie in host memory (offload) beside an accelerator.
    """

    group: Any
    name: str
    device: torch.device


class ShardedOptimizer(torch.optim.Optimizer):
    """Base of optimizers with per-tensor rules. Until `place` is called every parameter is one whole tensor.

    Args:
        groups: each with `params`, `tensors` (the `Whole` of each parameter, in order), `state_names` (state tensors
            that the rule keeps), `lr`, and `weight_decay`: tensors that decay are multiplied by 1 - lr x weight_decay.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__([{**group, "steps_done": 0} for group in groups], defaults={})
        self._pieces = {
            whole.name: Piece(flat=parameter, offset=0, start=0, numel=parameter.numel())
            for group in self.param_groups
            for whole, parameter in zip(group["tensors"], group["params"], strict=True)
        }
        self._sharers: Sharers | None = None

    def place(self, pieces: dict[str, Piece], sharers: Sharers | None) -> None:
        """Learn where the tensors lie.

        Args:
            pieces: name -> this rank's piece, for the tensors of which it has one.
            sharers: the ranks that hold the other pieces; None if the pieces are whole, and nothing is communicated.
        """
        self._pieces, self._sharers = pieces, sharers

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every group whose parameters are there; a collective if the tensors are sharded.

        DeepSpeed shows one group after the other, the same on every rank.
        """
        assert closure is None
        for group in self.param_groups:
            if group["params"]:
                group["steps_done"] += 1
                self.update(group, list(self._views(group)))

    def update(self, group: dict[str, Any], views: list[Views]) -> None:
        """Do the step number `group["steps_done"]` (from 1) of a group on this rank's pieces of its tensors."""
        raise NotImplementedError

    def _views(self, group: dict[str, Any]) -> Iterator[Views]:
        for index, whole in enumerate(group["tensors"]):
            piece = self._pieces.get(whole.name)
            if piece is None:
                continue
            # A tensor that the step did not use; in a shard its gradient is a piece of zeros.
            gradient = torch.zeros_like(piece.flat) if piece.flat.grad is None else piece.flat.grad
            state = self.state[piece.flat]
            for name in group["state_names"]:
                if name not in state:
                    state[name] = torch.zeros_like(piece.flat, requires_grad=False)
            yield Views(
                index=index,
                whole=whole,
                piece=piece,
                weight=piece.of(piece.flat),
                gradient=piece.of(gradient),
                state={name: piece.of(state[name]) for name in group["state_names"]},
            )


def decay(group: dict[str, Any], views: Views) -> None:
    """Shrink the weights of a tensor that decays by the factor 1 - lr x weight_decay of its group."""
    if views.whole.decays:
        views.weight.mul_(1.0 - group["lr"] * group["weight_decay"])
