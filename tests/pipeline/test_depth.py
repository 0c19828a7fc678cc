"""The drawn depth has the reference's distribution and is a function of (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.depth import Depth, DepthConfig, draw_depth
from pipeline.errors import ConfigError


def test_quantiles_and_moments_are_the_reference_s() -> None:
    """Numbers measured on 4 million draws of the reference's sampler at mean parameter 32."""
    draws = np.array([sum(draw_depth(DepthConfig(), 1, step)) for step in range(40_000)])
    assert draws.mean() == pytest.approx(32.97, abs=0.35)
    assert draws.std() == pytest.approx(17.9, abs=0.5)
    quantiles = np.quantile(draws, [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    assert np.abs(quantiles - [8, 12, 20, 29, 41, 67, 94]).max() <= 2
    assert (draws <= 8).mean() == pytest.approx(0.014, abs=0.003)
    assert (draws > 64).mean() == pytest.approx(0.058, abs=0.006)


def test_gradient_iterations_fill_up_to_their_limit() -> None:
    for step in range(500):
        depth = draw_depth(DepthConfig(mean_recurrence=8, mean_backprop_depth=4), 3, step)
        assert depth.k == min(4, depth.n + depth.k)
        assert depth.k >= 1
        assert depth.n >= 0


def test_depths_are_a_function_of_seed_and_step() -> None:
    config = DepthConfig(mean_recurrence=8, mean_backprop_depth=4)
    # Pinned: a run that resumes under another version of anything must draw what it would have drawn.
    assert [draw_depth(config, 233, step) for step in range(4)] == PINNED
    assert [draw_depth(config, 234, step) for step in range(50)] != [
        draw_depth(config, 233, step) for step in range(50)
    ]


PINNED = [Depth(0, 2), Depth(0, 4), Depth(4, 4), Depth(0, 2)]


def test_a_very_deep_mean_does_not_underflow() -> None:
    draws = [sum(draw_depth(DepthConfig(mean_recurrence=2000, sigma=0.1), 0, step)) for step in range(300)]
    assert np.mean(draws) == pytest.approx(2001, rel=0.02)


@pytest.mark.parametrize(
    "change", [{"mean_recurrence": 0}, {"mean_backprop_depth": 0}, {"mean_backprop_depth": 33}, {"sigma": -1.0}]
)
def test_parameters_without_a_meaning_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"depth.{next(iter(change))}"):
        DepthConfig(**change)  # type: ignore[arg-type]
