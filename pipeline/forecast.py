"""What a run will draw, and what that costs, before it is submitted."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.depth import Depth, DepthConfig, DepthSchedule, deal
from pipeline.errors import ConfigError
from pipeline.flops import SequenceFlops, sequence_flops
from pipeline.samplers import Integers, expectation
from pipeline.schedules import RampConfig, batch_size, learning_rate_ratio, samples_before

if TYPE_CHECKING:
    from pipeline.config import RunConfig

_UNIT_STEPS = 1000
"""Steps that are drawn where every micro-batch or sequence has its own depth; evenly spaced over those asked for."""
_QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)


def forecast(config: RunConfig, steps: int, ranks: int = 1) -> dict[str, Any]:
    """Return what the first `steps` steps draw and cost.

    Args:
        config: the resolved configuration.
        steps: number of steps.
        ranks: number of ranks for `imbalance`.

    Returns:
        name, steps, samples; sampler, scope; recurrence (expectation at the end of the ramp, mean, std, quantiles, min
        and max of what is drawn); histogram {r: count}; flops (of one sequence: outside and iteration; total of all
        steps; mean, lowest and highest step; saved: part that the ramps of depth save); imbalance (mean over steps of
        the FLOPs that the ranks wait for, over the mean rank's); curve (by drawn step: step, recurrence, limit, n, k,
        flops, batch_size, learning_rate).

    Raises:
        ConfigError: more steps than the run has, or ranks that do not divide the batch.
    """
    if not 1 <= steps <= config.train.steps:
        raise ConfigError(f"--steps {steps}: the run has train.steps = {config.train.steps}, from 1 on")
    config.train.check_world_size(ranks, config.schedule)
    flops = sequence_flops(config.model, config.train.activation_checkpointing)
    stride = 1 if config.depth.scope == "lockstep" else -(-steps // _UNIT_STEPS)
    numbers = list(range(0, steps, stride))
    sizes = np.array([batch_size(config.schedule, config.train.global_batch_size, step) for step in numbers])
    drawn = _draw(config, config.depth, numbers, sizes)
    costs = [_costs(flops, depths) for depths in drawn]
    step_flops = np.array([size * cost.mean() for size, cost in zip(sizes, costs, strict=True)])
    total = float(step_flops.mean() * steps) if stride > 1 else float(step_flops.sum())
    depths = np.concatenate(drawn)
    recurrences, counts = np.unique(depths.sum(axis=1), return_counts=True)
    return {
        "name": config.name,
        "steps": steps,
        "drawn_steps": len(numbers),
        "samples": samples_before(config.schedule, config.train.global_batch_size, steps),
        "sampler": config.depth.sampler,
        "scope": config.depth.scope,
        "recurrence": _summary(config.depth, depths.sum(axis=1)),
        "histogram": {str(r): int(count) for r, count in zip(recurrences, counts, strict=True)},
        "flops": {
            "outside": flops.outside,
            "iteration": flops.iteration,
            "total": total,
            "mean_step": float(step_flops.mean()),
            "lowest_step": float(step_flops.min()),
            "highest_step": float(step_flops.max()),
            "saved": _saved(config, flops, numbers, sizes, step_flops),
        },
        "ranks": ranks,
        "imbalance": _imbalance(config, costs, ranks),
        "curve": _curve(config, numbers, drawn, sizes, step_flops),
    }


def _draw(config: RunConfig, depth: DepthConfig, steps: list[int], sizes: npt.NDArray[np.int64]) -> list[Integers]:
    """Return the depths (units, 2) of every step."""
    schedule = DepthSchedule(depth, config.seed)
    if depth.scope == "lockstep":
        return list(schedule.lockstep(steps)[:, None])
    micro = config.train.micro_batch_size
    if depth.scope == "balanced":
        return [schedule.units(step, 0, int(size) // micro) for step, size in zip(steps, sizes, strict=True)]
    consumed = (samples_before(config.schedule, config.train.global_batch_size, step) for step in steps)
    return [schedule.units(*unit) for unit in zip(steps, consumed, sizes.tolist(), strict=True)]


def _costs(flops: SequenceFlops, depths: Integers) -> npt.NDArray[np.float64]:
    return np.array([flops.training(Depth(n, k)) for n, k in depths.tolist()])


def _summary(config: DepthConfig, recurrences: Integers) -> dict[str, Any]:
    quantiles = np.quantile(recurrences, _QUANTILES)
    return {
        "expected": expectation(config.sampler, config.mean_recurrence),
        "mean": float(recurrences.mean()),
        "std": float(recurrences.std()),
        "min": int(recurrences.min()),
        "max": int(recurrences.max()),
        "quantiles": {str(q): float(value) for q, value in zip(_QUANTILES, quantiles, strict=True)},
    }


def _saved(
    config: RunConfig,
    flops: SequenceFlops,
    steps: list[int],
    sizes: npt.NDArray[np.int64],
    step_flops: npt.NDArray[np.float64],
) -> float:
    """Return the part of the FLOPs that the ramps of depth save, for the same random words."""
    constant = dataclasses.replace(config.depth, recurrence_ramp=RampConfig(), backprop_ramp=RampConfig())
    if constant == config.depth:
        return 0.0
    full = [_costs(flops, depths).mean() for depths in _draw(config, constant, steps, sizes)]
    return 1.0 - float(step_flops.sum() / np.dot(full, sizes))


def _imbalance(config: RunConfig, costs: list[npt.NDArray[np.float64]], ranks: int) -> float:
    if config.depth.scope == "lockstep" or ranks == 1:
        return 1.0
    return float(np.mean([_wait(config, cost, ranks) for cost in costs[:: -(-len(costs) // 50)]]))


def waiting(loads: npt.NDArray[np.float64], *, every_micro_batch: bool) -> float:
    """Return how long a step takes, over the mean work of a rank.

    Args:
        loads: (ranks, micro-batches) cost of each, in the order in which a rank does them.
        every_micro_batch: whether the ranks wait for each other at each, or only at the end of the step.
    """
    longest = loads.max(axis=0).sum() if every_micro_batch else loads.sum(axis=1).max()
    return float(longest * len(loads) / loads.sum())


def _wait(config: RunConfig, costs: npt.NDArray[np.float64], ranks: int) -> float:
    if config.depth.scope == "balanced":
        loads = costs[np.array(deal(costs.tolist(), ranks))]
    else:
        loads = costs.reshape(ranks, -1, config.train.micro_batch_size).sum(axis=2)
    # From stage 2 on, gradients are reduced in every backward pass.
    return waiting(loads, every_micro_batch=config.zero.stage >= 2)


def _curve(
    config: RunConfig,
    steps: list[int],
    drawn: list[Integers],
    sizes: npt.NDArray[np.int64],
    step_flops: npt.NDArray[np.float64],
) -> dict[str, list[float]]:
    schedule = DepthSchedule(config.depth, config.seed)
    rate = config.optimizer.learning_rate
    return {
        "step": list(steps),
        "mean_recurrence": schedule.means(steps).tolist(),
        "backprop_depth": schedule.limits(steps).tolist(),
        "n": [float(depths[:, 0].mean()) for depths in drawn],
        "k": [float(depths[:, 1].mean()) for depths in drawn],
        "flops": step_flops.tolist(),
        "batch_size": sizes.tolist(),
        "learning_rate": [rate * learning_rate_ratio(config.schedule, step, config.train.steps) for step in steps],
    }
