"""The laws that a depth is drawn from: raw Philox words in, recurrences out.

numpy guarantees Philox's words but may change how its distributions consume them, and a resumed run must not notice
an upgrade; hence every distribution is inverted here by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

SAMPLERS = (
    "lognormal_poisson",
    "poisson",
    "negative_binomial",
    "uniform",
    "geometric",
    "sobol",
    "fixed",
    "full",
    "non_recurrent",
)
WORDS = 4
"""Words of a draw: one Philox block."""

_MASKS = ((1, 0x5555555555555555), (2, 0x3333333333333333), (4, 0x0F0F0F0F0F0F0F0F))
_WIDE_MASKS = ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF))


def step_words(seed: int, step: int) -> Words:
    """Return the words (1, 4) of a draw that the whole step shares."""
    return np.random.Philox(key=_key(seed, step)).random_raw(WORDS)[None]


def unit_words(seed: int, step: int, first: int, count: int) -> Words:
    """Return the words (count, 4) of the micro-batches or sequences `first`, `first` + 1, ... of a step.

    A block's place in the generator's stream is the number of the unit, apart from the stream of `step_words`.
    """
    generator = np.random.Philox(key=_key(seed, step), counter=np.array([first, 1, 0, 0], dtype=np.uint64))
    return generator.random_raw(WORDS * count).reshape(count, WORDS)


def sobol_words(points: npt.ArrayLike, shift: np.uint64) -> Words:
    """Return the one-dimensional Sobol sequence at `points` (n,) as words (n, 1), shifted digit by digit.

    Any 2^m consecutive points fall into different intervals of length 2^-m (van der Corput's sequence in base 2).
    """
    x = np.asarray(points, dtype=np.uint64)
    for bits, mask in _MASKS + _WIDE_MASKS:  # reverse the 64 bits
        width, chosen = np.uint64(bits), np.uint64(mask)
        x = ((x >> width) & chosen) | ((x & chosen) << width)
    return (x ^ shift)[:, None]


def recurrences(sampler: str, means: Floats, sigma: float, words: Words) -> Integers:
    """Return the number of core iterations r >= 1 of each draw.

    lognormal_poisson: 1 + Poisson(exp(tau)), tau ~ N(ln mean - sigma^2 / 2, sigma) (arXiv 2502.05171, section 3.3), so
    E[r] = mean + 1. poisson: its limit at sigma 0. negative_binomial: 1 + a count of the same mean and variance as the
    log-normal Poisson's, with a lighter tail. uniform: 1 to 2 mean - 1. geometric: from 1, expectation mean. sobol:
    the uniform law, drawn with low discrepancy. fixed, full, non_recurrent: the mean.

    Args:
        sampler: one of `SAMPLERS`.
        means: (n,) mean parameter of each draw, at least 1.
        sigma: spread of the two mixtures of Poisson laws.
        words: (n, 1) or (n, 4) random words.
    """
    uniform = _uniform(words[:, 0])
    if sampler == "lognormal_poisson":
        normal = np.array([NormalDist().inv_cdf(value) for value in uniform])
        rates = np.exp(np.log(means) - sigma**2 / 2 + sigma * normal)
        return 1 + _poisson(rates, _uniform(words[:, 1]))
    if sampler == "poisson":
        return 1 + _poisson(means, uniform)
    if sampler == "negative_binomial":
        return 1 + _negative_binomial(means, 1.0 / math.expm1(sigma**2), uniform)
    if sampler in ("uniform", "sobol"):
        return 1 + np.floor(uniform * np.rint(2.0 * means - 1.0)).astype(np.int64)
    if sampler == "geometric":
        with np.errstate(divide="ignore"):  # a mean of 1 never goes on
            return 1 + np.floor(np.log(uniform) / np.log1p(-1.0 / means)).astype(np.int64)
    return np.rint(means).astype(np.int64)


def expectation(sampler: str, mean: float) -> float:
    """Return E[r] at a mean parameter."""
    counts = ("lognormal_poisson", "poisson", "negative_binomial")
    return mean + 1.0 if sampler in counts else mean


def _key(seed: int, step: int) -> Words:
    return np.array([seed, step], dtype=np.uint64)


def _uniform(words: Words) -> Floats:
    """Return numbers strictly between 0 and 1."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _poisson(rates: Floats, uniform: Floats) -> Integers:
    first = _far_left(rates, rates)
    start = np.array([k * math.log(rate) - rate - math.lgamma(k + 1) for k, rate in zip(first, rates, strict=True)])
    return _invert(uniform, first, np.exp(start), lambda count, draws: rates[draws] / count)


def _negative_binomial(means: Floats, shape: float, uniform: Floats) -> Integers:
    """Invert the law with expectation m and variance m + m^2 / shape."""
    first = _far_left(means, means + means**2 / shape)
    start = [
        math.lgamma(k + shape) - math.lgamma(shape) - math.lgamma(k + 1)
        - shape * math.log1p(mean / shape) + k * math.log(mean / (shape + mean))
        for k, mean in zip(first, means, strict=True)
    ]  # fmt: skip
    again = means / (shape + means)
    return _invert(uniform, first, np.exp(start), lambda count, draws: again[draws] * (count - 1 + shape) / count)


def _far_left(means: Floats, variances: Floats) -> Integers:
    """Return counts that hold next to nothing of a law below them, but whose probability does not underflow."""
    return np.floor(np.maximum(0.0, means - 12.0 * np.sqrt(variances))).astype(np.int64)


def _invert(
    uniform: Floats, first: Integers, probability: Floats, ratio: Callable[[Integers, Integers], Floats]
) -> Integers:
    """Return the first count of each draw at which the law's sum reaches `uniform`.

    Args:
        uniform: (n,) numbers in (0, 1).
        first: (n,) counts at which the sums begin.
        probability: (n,) probabilities of those.
        ratio: (counts, draws) -> P(count) / P(count - 1) of each of the draws.
    """
    counts, remaining, probability = first.copy(), uniform.copy(), probability.copy()
    running = np.flatnonzero(remaining > probability)
    while running.size:
        remaining[running] -= probability[running]
        counts[running] += 1
        probability[running] *= ratio(counts[running], running)
        going = (remaining[running] > probability[running]) & (probability[running] > 0.0)
        running = running[going]
    return counts
