"""How deep the model thinks: a pure function of (seed, step[, micro-batch or sample]), never of rank or restart."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError
from pipeline.samplers import SAMPLERS, Integers, Words, recurrences, sobol_words, step_words, unit_words
from pipeline.schedules import RampConfig

SCOPES = ("lockstep", "balanced", "per_sequence")
_LARGEST_MEAN, _LARGEST_SIGMA = 10_000, 2.0
_FIXED = ("fixed", "full", "non_recurrent")


class Depth(NamedTuple):
    """Iterations of the core: n without gradient, then k with it."""

    n: int
    k: int


@dataclass(kw_only=True)
class DepthConfig:
    """Drawn recurrence with truncated backpropagation (arXiv 2502.05171, section 3.3): k = min(r, limit), n = r - k."""

    sampler: str = "lognormal_poisson"
    """Law of r: lognormal_poisson, poisson, negative_binomial (1 + a count, so E[r] = mean + 1), uniform, geometric,
    sobol (E[r] = mean), fixed, full (fixed, all with gradient), non_recurrent (r = 1)."""
    scope: str = "lockstep"
    """What shares a draw: lockstep the whole step, balanced each micro-batch, per_sequence each sequence."""
    mean_recurrence: int = 32
    """Mean parameter of the draw, at the end of its ramp if there is one."""
    sigma: float = 0.5
    """Standard deviation of the logarithm of the rate: lognormal_poisson; negative_binomial has the same variance."""
    mean_backprop_depth: int = 8
    """Most iterations that carry a gradient, at the end of its ramp if there is one; `full` has no limit."""
    recurrence_ramp: RampConfig = field(default_factory=RampConfig)
    """Way of the mean recurrence to `mean_recurrence`."""
    backprop_ramp: RampConfig = field(default_factory=RampConfig)
    """Way of the limit to `mean_backprop_depth`."""

    def __post_init__(self) -> None:
        """Refuse parameters without a meaning."""
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"depth.sampler: {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        if self.scope not in SCOPES:
            raise ConfigError(f"depth.scope: {self.scope!r} is not one of {', '.join(SCOPES)}")
        if not 1 <= self.mean_recurrence <= _LARGEST_MEAN:
            raise ConfigError(f"depth.mean_recurrence: {self.mean_recurrence} is not in [1, {_LARGEST_MEAN}]")
        if self.mean_backprop_depth < 1:
            raise ConfigError(f"depth.mean_backprop_depth: {self.mean_backprop_depth} is not positive")
        if self.sigma < 0.0 or (self.sampler == "negative_binomial" and self.sigma < 0.01):
            raise ConfigError(
                f"depth.sigma: {self.sigma} is too small for depth.sampler = {self.sampler}; at 0 it is poisson"
            )
        if self.sigma > _LARGEST_SIGMA:
            raise ConfigError(f"depth.sigma: {self.sigma} is above {_LARGEST_SIGMA}: hardly a draw is near the mean")
        for name in ("recurrence_ramp", "backprop_ramp"):
            useless = self.sampler == "non_recurrent" or (self.sampler == "full" and name == "backprop_ramp")
            if useless and getattr(self, name).kind != "constant":
                raise ConfigError(f"depth.{name}: has no effect with depth.sampler = {self.sampler}; leave it out")
        if self.sampler == "non_recurrent" and self.mean_recurrence != 1:
            raise ConfigError(
                f"depth.mean_recurrence: {self.mean_recurrence} with depth.sampler = non_recurrent, which passes the"
                " core once; set depth.mean_recurrence=1 and depth.mean_backprop_depth=1"
            )
        if self.sampler in _FIXED and self.scope != "lockstep":
            raise ConfigError(
                f"depth.scope: {self.scope} with depth.sampler = {self.sampler}, which draws nothing; use lockstep"
            )

    def check(self, total_steps: int, micro_batch_size: int) -> None:
        """Refuse what a run of `total_steps` with this micro-batch cannot do.

        Raises:
            ConfigError: a ramp makes no sense, more iterations with gradient than the mean, one depth a sequence where
                there is one sequence.
        """
        for name, end in (("recurrence_ramp", self.mean_recurrence), ("backprop_ramp", self.mean_backprop_depth)):
            if problem := getattr(self, name).problem(end, total_steps):
                raise ConfigError(f"depth.{name}.{problem[0]}: {problem[1]}")
        if self.scope == "per_sequence" and micro_batch_size < 2:
            raise ConfigError(
                "depth.scope: per_sequence needs several sequences in a micro-batch, and train.micro_batch_size is"
                f" {micro_batch_size}; raise it, or use lockstep or balanced"
            )
        if self.sampler == "full":
            return
        steps = np.arange(total_steps)
        means = self.recurrence_ramp.values(steps, self.mean_recurrence)
        limits = np.rint(self.backprop_ramp.values(steps, self.mean_backprop_depth))
        over = np.flatnonzero(limits > means)
        if over.size:
            mean, limit = means[over[0]], int(limits[over[0]])
            raise ConfigError(
                f"depth.mean_backprop_depth: {limit} iterations with gradient exceed the mean recurrence of {mean:.4g}"
                f" at step {over[0]}, so the mean could not be kept; lower it to at most {int(means.min())}, ramp it"
                " with depth.backprop_ramp, or raise depth.recurrence_ramp.start"
            )


class DepthSchedule:
    """The depths of a run.

    Args:
        config: law, scope and ramps.
        seed: the run's seed.
    """

    def __init__(self, config: DepthConfig, seed: int) -> None:
        self.config, self._seed = config, seed

    def means(self, steps: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the mean parameter of each of `steps`."""
        return self.config.recurrence_ramp.values(steps, self.config.mean_recurrence)

    def limits(self, steps: npt.ArrayLike) -> Integers:
        """Return the most iterations with gradient in each of `steps`."""
        return np.rint(self.config.backprop_ramp.values(steps, self.config.mean_backprop_depth)).astype(np.int64)

    def at(self, step: int) -> Depth:
        """Return the depth that all of `step` shares (lockstep)."""
        return _as_depths(self.lockstep([step]))[0]

    def lockstep(self, steps: Sequence[int]) -> Integers:
        """Return `at` of every one of `steps` as an array (steps, 2)."""
        if self.config.sampler == "sobol":
            words = sobol_words(steps, step_words(self._seed, 2**64 - 1)[0, 0])
        else:
            words = np.concatenate([step_words(self._seed, step) for step in steps])
        return self._draw(np.asarray(steps), words)

    def balanced(self, step: int, micro_batches: int) -> list[Depth]:
        """Return the depth of every micro-batch of the global batch of `step`, in order; `deal` gives them to ranks."""
        return _as_depths(self.units(step, 0, micro_batches))

    def per_sequence(self, step: int, samples: Sequence[int]) -> list[Depth]:
        """Return the depth of each of the global sample indices in `step`, all of them of one global batch."""
        indices = np.asarray(samples, dtype=np.int64)
        first = int(indices.min())
        return _as_depths(self.units(step, first, int(indices.max()) - first + 1)[indices - first])

    def units(self, step: int, first: int, count: int) -> Integers:
        """Return the depths (count, 2) of the micro-batches or sequences from `first` on."""
        if self.config.sampler == "sobol":
            words = sobol_words(np.arange(first, first + count), step_words(self._seed, step)[0, 0])
        else:
            words = unit_words(self._seed, step, first, count)
        return self._draw(np.full(count, step), words)

    def digest(self, steps: Iterable[int]) -> str:
        """Return a hash of the depths in `steps`, by which ranks find out that they would draw different ones."""
        digest = hashlib.sha256(repr(self.config).encode())
        for step in steps:
            drawn = self.lockstep([step]) if self.config.scope == "lockstep" else self.units(step, 0, 64)
            digest.update(drawn.astype("<i8").tobytes())
        return digest.hexdigest()

    def _draw(self, steps: npt.NDArray[np.integer], words: Words) -> Integers:
        config = self.config
        drawn = recurrences(config.sampler, self.means(steps), config.sigma, words)
        with_gradient = drawn if config.sampler == "full" else np.minimum(drawn, self.limits(steps))
        return np.stack([drawn - with_gradient, with_gradient], axis=1)


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Deal items to ranks, equally many to each, so that the largest sum of costs is small; every rank computes it all.

    Longest processing time first (Graham 1969) among the ranks that still have room.

    Args:
        costs: cost of each item; their number is a multiple of `ranks`.
        ranks: number of ranks.

    Returns:
        Items of each rank, the costliest first: where ranks meet at every micro-batch (ZeRO stages 2 and 3), those that
        they do at the same time are then alike.
    """
    share = len(costs) // ranks
    assert share * ranks == len(costs)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, rank = loads[0]
        hands[rank].append(item)
        if len(hands[rank]) < share:
            heapq.heapreplace(loads, (load + costs[item], rank))
        else:
            heapq.heappop(loads)
    return hands


def _as_depths(drawn: Integers) -> list[Depth]:
    return [Depth(n, k) for n, k in drawn.tolist()]
