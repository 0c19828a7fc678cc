"""Muon: momentum whose matrices are made orthogonal, and Adam for everything that is not a matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed

from pipeline.journal import journal
from pipeline.sharding import ShardedOptimizer, Sharers, Views, decay

# Quintic whose iteration brings singular values in (0, 1] near 1 in five steps (Jordan et al., "Muon: an optimizer
# for hidden layers in neural networks", 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Return U V^T, nearly, of a matrix (rows, columns) = U S V^T, by `steps` Newton-Schulz iterations in float32."""
    a, b, c = _QUINTIC
    wide = matrix.shape[0] <= matrix.shape[1]
    x: torch.Tensor = matrix if wide else matrix.T
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


class Muon(ShardedOptimizer):
    """Muon for the one group with `momentum`, AdamW for the others, the same at every sharding.

    A matrix's update is 0.2 sqrt(max(rows, columns)) times the orthogonalised Nesterov momentum: its root mean square
    is about that of an Adam update (Moonlight, arXiv 2502.16982), so that rates and decay are comparable.

    Under ZeRO every matrix has an owner. The ranks send it their pieces of the momentum, it orthogonalises the whole
    matrix and sends the pieces back: two all-to-alls a step, in which a rank sends and receives about its own share of
    the weights. Gathering the matrices everywhere would move (ranks - 1) times the bytes and repeat the same
    arithmetic on every rank; here it is divided among them.

    Args:
        groups: as for `ShardedOptimizer`; the matrices' with `momentum` and `newton_schulz_steps`, the others with
            `betas` and `eps`.
    """

    STATE = ("momentum",)
    ADAM_STATE = ("exp_avg", "exp_avg_sq")

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups)
        self._exchange: _Exchange | None = None

    def update(self, group: dict[str, Any], views: list[Views]) -> None:
        """Update matrices by Muon or the rest by Adam, as the group says."""
        if "momentum" not in group:
            for each in views:
                _adam(group, each)
            return
        wanted: dict[int, torch.Tensor] = {}
        for each in views:
            momentum = each.state["momentum"].lerp_(each.gradient, 1.0 - group["momentum"])
            wanted[each.index] = torch.lerp(each.gradient, momentum, group["momentum"])
        directions = self._orthogonalized(group, wanted)
        for each in views:
            decay(group, each)
            scale = 0.2 * math.sqrt(max(each.whole.shape))
            each.weight.add_(directions[each.index], alpha=-group["lr"] * scale)

    def _orthogonalized(self, group: dict[str, Any], pieces: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return this rank's pieces of the orthogonalised matrices, of which `pieces` are its pieces."""
        shapes = [whole.shape for whole in group["tensors"]]
        steps = group["newton_schulz_steps"]
        if self._sharers is None:
            return {i: orthogonalize(piece.view(shapes[i]), steps).reshape(-1) for i, piece in pieces.items()}
        if self._exchange is None:
            places = [self._pieces.get(whole.name) for whole in group["tensors"]]
            spans = [(0, 0) if place is None else (place.start, place.numel) for place in places]
            self._exchange = _Exchange(shapes, spans, self._sharers)
        matrices = self._exchange.gather(pieces)
        directions = {index: orthogonalize(matrix, steps) for index, matrix in matrices.items()}
        home = group["params"][0].device
        return {index: piece.to(home) for index, piece in self._exchange.scatter(directions).items()}


def _adam(group: dict[str, Any], views: Views) -> None:
    """AdamW (arXiv 1711.05101); element by element, so that sharding does not matter."""
    (beta1, beta2), step = group["betas"], group["steps_done"]
    mean = views.state["exp_avg"].lerp_(views.gradient, 1.0 - beta1)
    square = views.state["exp_avg_sq"].mul_(beta2).addcmul_(views.gradient, views.gradient, value=1.0 - beta2)
    decay(group, views)
    root = square.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(group["eps"])
    views.weight.addcdiv_(mean, root, value=-group["lr"] / (1.0 - beta1**step))


class _Exchange:
    """Moves the pieces of matrices between the ranks that hold them and the ranks that own them.

    Args:
        shapes: shape of every matrix.
        spans: (start, numel) of this rank's piece of every matrix; numel 0 for none.
        sharers: the ranks that hold the pieces.
    """

    def __init__(self, shapes: list[torch.Size], spans: list[tuple[int, int]], sharers: Sharers) -> None:
        self._shapes, self._group, self._name, self._device = shapes, sharers.group, sharers.name, sharers.device
        self._rank = torch.distributed.get_rank(self._group)
        self._world = torch.distributed.get_world_size(self._group)
        own = torch.tensor(spans, device=self._device)
        everyone = [torch.empty_like(own) for _ in range(self._world)]
        with journal.collective("all_gather", own.nbytes * self._world, self._name):
            torch.distributed.all_gather(everyone, own, group=self._group)
        self._spans = [each.tolist() for each in everyone]
        self._owners = owners(shapes, self._world)
        numels = [span[1] for span in spans]
        # Both sides list the pieces in the order of the matrices, so that no addresses travel with them.
        self._sent = [[i for i, owner in enumerate(self._owners) if owner == rank] for rank in range(self._world)]
        self._own = self._sent[self._rank]
        self._send_sizes = [sum(numels[i] for i in indices) for indices in self._sent]
        self._receive_sizes = [sum(self._spans[rank][i][1] for i in self._own) for rank in range(self._world)]

    def gather(self, pieces: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Send every piece to the owner of its matrix; return the matrices that this rank owns."""
        outgoing = [pieces[i] for indices in self._sent for i in indices if i in pieces]
        received = self._all_to_all(outgoing, self._send_sizes, self._receive_sizes)
        matrices = {i: torch.empty(self._shapes[i], device=self._device) for i in self._own}
        for span, piece in self._cut(received):
            matrix, start = span
            matrices[matrix].view(-1)[start : start + piece.numel()] = piece
        return matrices

    def scatter(self, matrices: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Send the pieces of the owned matrices back to those who hold them; return this rank's pieces."""
        flat = {i: matrix.reshape(-1) for i, matrix in matrices.items()}
        outgoing = [
            flat[i][start : start + numel]
            for rank in range(self._world)
            for i, (start, numel) in ((i, self._spans[rank][i]) for i in self._own)
        ]
        received = self._all_to_all(outgoing, self._receive_sizes, self._send_sizes)
        indices = [i for indices in self._sent for i in indices]
        sizes = [self._spans[self._rank][i][1] for i in indices]
        return {i: piece for i, piece in zip(indices, received.split(sizes), strict=True) if piece.numel()}

    def _cut(self, received: torch.Tensor) -> list[tuple[tuple[int, int], torch.Tensor]]:
        """Return ((matrix, first element), piece) of everything that `gather` received."""
        addresses = [(i, *self._spans[rank][i]) for rank in range(self._world) for i in self._own]
        pieces = received.split([numel for *_, numel in addresses]) if addresses else ()
        return [((i, start), piece) for (i, start, _), piece in zip(addresses, pieces, strict=True)]

    def _all_to_all(self, outgoing: list[torch.Tensor], send: list[int], receive: list[int]) -> torch.Tensor:
        buffer = torch.cat(outgoing).to(self._device) if outgoing else torch.empty(0, device=self._device)
        received = torch.empty(sum(receive), device=self._device)
        with journal.collective("all_to_all_single", buffer.nbytes, self._name):
            torch.distributed.all_to_all_single(received, buffer, receive, send, group=self._group)
        return received


def owners(shapes: list[torch.Size], ranks: int) -> list[int]:
    """Return the rank that orthogonalises each matrix: the costliest first, each to the rank with the least work."""
    # A Newton-Schulz iteration multiplies (s, s) by (s, l) matrices, s the shorter side: s^2 (2 l + s).
    costs = [min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes]
    work, owner = [0] * ranks, [0] * len(shapes)
    for index in sorted(range(len(shapes)), key=lambda i: (-costs[i], i)):
        owner[index] = work.index(min(work))
        work[owner[index]] += costs[index]
    return owner
