"""How deep the model thinks at a step: a pure function of (seed, step), never of the rank or of a restart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from pipeline.errors import ConfigError

# exp(-rate) must not underflow in the inversion below.
_LARGEST_RATE = 500.0


class Depth(NamedTuple):
    """Iterations of the core in one step: n without gradient, then k with it."""

    n: int
    k: int


@dataclass(kw_only=True)
class DepthConfig:
    """Log-normal Poisson recurrence with truncated backpropagation (arXiv 2502.05171, section 3.3)."""

    mean_recurrence: int = 32
    """Mean parameter of the draw; the expected number of iterations is one more."""
    sigma: float = 0.5
    """Standard deviation of the logarithm of the Poisson rate."""
    mean_backprop_depth: int = 8
    """Most iterations that carry a gradient."""

    def __post_init__(self) -> None:
        """Refuse parameters without a meaning."""
        if self.mean_recurrence < 1:
            raise ConfigError(f"depth.mean_recurrence: {self.mean_recurrence} is not positive")
        if self.mean_backprop_depth < 1:
            raise ConfigError(f"depth.mean_backprop_depth: {self.mean_backprop_depth} is not positive")
        if self.mean_backprop_depth > self.mean_recurrence:
            raise ConfigError(
                f"depth.mean_backprop_depth: {self.mean_backprop_depth} exceeds depth.mean_recurrence ="
                f" {self.mean_recurrence}, so the mean could not be kept; lower it to at most {self.mean_recurrence}"
            )
        if self.sigma < 0.0:
            raise ConfigError(f"depth.sigma: {self.sigma} is negative")


def draw_depth(config: DepthConfig, seed: int, step: int) -> Depth:
    """Return the depth of `step`: r = Poisson(exp(tau)) + 1, tau ~ N(ln mean - sigma^2 / 2, sigma), k = min(r, k_max).

    Uses raw Philox words, whose stream numpy guarantees, and inverts the distributions itself: numpy may change how
    its distributions consume random words, and a resumed run must not notice an upgrade.
    """
    words = np.random.Philox(key=np.array([seed, step], dtype=np.uint64))
    normal = NormalDist().inv_cdf(_uniform(words))
    rate = math.exp(math.log(config.mean_recurrence) - config.sigma**2 / 2 + config.sigma * normal)
    recurrence = _poisson(rate, words) + 1
    k = min(recurrence, config.mean_backprop_depth)
    return Depth(recurrence - k, k)


def _uniform(words: np.random.Philox) -> float:
    """Return a number strictly between 0 and 1."""
    return (float(int(words.random_raw()) >> 12) + 0.5) * 2.0**-52


def _poisson(rate: float, words: np.random.Philox) -> int:
    """Invert the Poisson distribution; a large rate is a sum of independent smaller ones."""
    total = 0
    while rate > 0.0:
        part = min(rate, _LARGEST_RATE)
        rate -= part
        remaining = _uniform(words)
        count, probability = 0, math.exp(-part)
        while remaining > probability and probability > 0.0:
            remaining -= probability
            count += 1
            probability *= part / count
        total += count
    return total
