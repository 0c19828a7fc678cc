"""What an optimizer step finds in the gradient and does to the weights, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_prep.world import World
from pipeline.engine import pieces
from pipeline.model import reference_name
from pipeline.sharding import Piece

# The parts of the model, by the beginnings of the reference's names; the norm at both ends of the coda is its own.
_PARTS = {
    "embedding": ("transformer.wte.",),
    "prelude": ("transformer.prelude.", "transformer.prelude_norm."),
    "adapter": ("transformer.adapter.",),
    "core": ("transformer.core_block.",),
    "coda": ("transformer.coda.", "transformer.ln_f.", "transformer.readout."),
    "head": ("lm_head.",),
}
SAMPLE = 65_536
# Elements worked on at a time, so that what is computed of a large tensor needs little memory.
_CHUNK = 2**20
# What is summed over the elements of every tensor, and how many pieces of it were measured, and had a second moment.
_SUMS = ("gradient", "weight", "sampled", "change", "ratio", "rate", "pieces", "moments")


@dataclass(kw_only=True)
class _Measured:
    """This rank's piece of a tensor.

    Attributes:
        index: number of the tensor in the model.
        piece: where it lies.
        sample: the elements of the piece that are sampled.
        before: their weights before the step.
        sums: by the names above, scalars on the device.
    """

    index: int
    piece: Piece
    sample: slice
    before: torch.Tensor | None = None
    sums: dict[str, torch.Tensor] = field(default_factory=dict)


class UpdateProbe:
    """Measures one optimizer step on this rank's pieces of all tensors, and adds up what the ranks found.

    The gradient is the clipped one that the optimizer sees. Its squares, the weights' and the optimizer's rms are of
    all elements, the rest of at most 65,536 of each tensor, evenly spaced: the same whatever its sharding.

    Args:
        engine: DeepSpeed's.
        world: the ranks.
    """

    def __init__(self, engine: Any, world: World) -> None:
        self._world = world
        levels, stage = engine.rookery_levels, engine.zero_optimization_stage()
        parameters = [(reference_name(name), value) for name, value in engine.module.named_parameters()]
        # ZeRO stage 3 shows a rank's part of a parameter.
        self._numels = {name: int(getattr(value, "ds_numel", value.numel())) for name, value in parameters}
        self._measured: dict[int, list[_Measured]] = {}
        # Every element once: without ZeRO all ranks have all of them, and with zero.scope = node all nodes have.
        if world.rank == 0 or (stage > 0 and (levels is None or levels.index == 0)):
            for name, piece in pieces(engine):
                stride = _stride(self._numels[name])
                each = _Measured(
                    index=list(self._numels).index(name), piece=piece, sample=slice(-piece.start % stride, None, stride)
                )
                self._measured.setdefault(id(piece.flat), []).append(each)

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the weights; right before the step of the parameter groups that `optimizer` shows."""
        for _, flat, each in self._shown(optimizer):
            each.before = each.piece.of(flat)[each.sample].clone()

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure; right after that step, while its gradients are there."""
        for group, flat, each in self._shown(optimizer):
            assert each.before is not None
            weight = each.piece.of(flat)
            sampled = weight[each.sample]
            moved = sampled - each.before
            each.sums = {
                "weight": _product(weight, weight),
                "sampled": _product(sampled, sampled),
                "change": _product(moved, moved),
            }
            each.before = None
            if flat.grad is None:
                continue
            gradient, state = each.piece.of(flat.grad), optimizer.state[flat]
            each.sums["gradient"] = _product(gradient, gradient)
            if "exp_avg_sq" in state:
                mean, square = (each.piece.of(state[name]) for name in ("exp_avg", "exp_avg_sq"))
                each.sums["ratio"] = squared_ratios(gradient, square, group["eps"])
                sample = each.sample
                each.sums["rate"] = effective_rates(mean[sample], square[sample], gradient[sample], group["eps"])

    def read(self) -> dict[str, Any]:
        """Return what was measured since the last reading, {} if nothing; a collective that waits for the device.

        Returns:
            gradient_share: part -> its share of |g|^2, for the parts that the model has: prelude, adapter, core, coda
                (with the final norm), embedding (a tied head included), head.
            optimizer_rms: tensor -> sqrt(mean(g^2 / max(v, eps^2))), v after the update (arXiv 2304.13013); tensors
                without a second moment are left out here and in the next.
            effective_rate: tensor -> mean(m / (sqrt(v) + eps) / g), with eps for g where |g| <= eps: the reference's
                formula. The smallest gradients decide it.
            update_ratio: tensor -> RMS of its change over RMS of its weights.
            weight_norm: L2 norms of the core's blocks, of the embedding, and of all but the embedding ("model").
        """
        table = self._world.sum(self._table().ravel()).reshape(len(self._numels), len(_SUMS))
        sums = dict(zip(_SUMS, table.T, strict=True))
        names = np.array(list(self._numels))
        if not sums["pieces"].any():
            return {}
        numels = np.array(list(self._numels.values()))
        strides = np.array([_stride(numel) for numel in self._numels.values()])
        parts = np.array([_part(name) for name in names])
        total = sums["gradient"].sum()
        shares = {part: float(sums["gradient"][parts == part].sum() / total) for part in _PARTS if part in parts}
        stated, moved = sums["moments"] > 0, sums["sampled"] > 0.0
        embedding = parts == "embedding"
        norms = {"core": parts == "core", "embedding": embedding, "model": ~embedding}
        record = {
            "gradient_share": shares if total > 0.0 and math.isfinite(total) else {},
            "optimizer_rms": _named(names[stated], np.sqrt(sums["ratio"][stated] / numels[stated])),
            "effective_rate": _named(names[stated], sums["rate"][stated] / -(-numels[stated] // strides[stated])),
            "update_ratio": _named(names[moved], np.sqrt(sums["change"][moved] / sums["sampled"][moved])),
            "weight_norm": {part: math.sqrt(sums["weight"][chosen].sum()) for part, chosen in norms.items()},
        }
        return {name: value for name, value in record.items() if value}

    def _shown(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], torch.Tensor, _Measured]]:
        """Yield (group, the optimizer's parameter, piece) of all that lies in the groups that `optimizer` shows."""
        for group in optimizer.param_groups:
            for flat in group["params"]:
                for each in self._measured.get(id(flat), ()):
                    yield group, flat, each

    def _table(self) -> npt.NDArray[np.float64]:
        """Return this rank's sums (tensors, sums), and forget them."""
        table = np.zeros((len(self._numels), len(_SUMS)))
        places, scalars = list[tuple[int, int]](), list[torch.Tensor]()
        for each in (each for group in self._measured.values() for each in group if each.sums):
            table[each.index, _SUMS.index("pieces")] += 1
            table[each.index, _SUMS.index("moments")] += "ratio" in each.sums
            places += [(each.index, _SUMS.index(name)) for name in each.sums]
            scalars += each.sums.values()
            each.sums = {}
        for place, value in zip(places, torch.stack(scalars).tolist() if scalars else (), strict=True):
            table[place] += value
        return table


def _stride(numel: int) -> int:
    """Return the distance of the sampled elements of a tensor."""
    return -(-numel // SAMPLE)


def _part(name: str) -> str:
    return next(part for part, beginnings in _PARTS.items() if name.startswith(beginnings))


def _named(names: npt.NDArray[np.str_], values: npt.NDArray[np.float64]) -> dict[str, float]:
    """Return name -> value in few digits: a log keeps as many of these as the model has tensors."""
    return {name: float(f"{value:.4g}") for name, value in zip(names.tolist(), values.tolist(), strict=True)}


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the inner product of vectors."""
    if len(a) <= _CHUNK:
        return torch.dot(a, b)
    return torch.stack([torch.dot(x, y) for x, y in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True)]).sum()


def squared_ratios(gradient: torch.Tensor, square: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the sum of g^2 / max(v, eps^2)."""
    if len(gradient) <= _CHUNK:
        return torch.dot(gradient / square.clamp_min(eps * eps), gradient)
    parts = zip(gradient.split(_CHUNK), square.split(_CHUNK), strict=True)
    return torch.stack([torch.dot(g / v.clamp_min(eps * eps), g) for g, v in parts]).sum()


def effective_rates(mean: torch.Tensor, square: torch.Tensor, gradient: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the sum of m / (sqrt(v) + eps) / g, with eps in place of g where |g| <= eps."""
    divisor = torch.where(gradient.abs() > eps, gradient, eps)
    return (mean / (square.sqrt() + eps) / divisor).sum()
