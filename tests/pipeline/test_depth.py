"""Depths have the laws they promise, are functions of seed, step and unit, and are dealt so that ranks work alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.depth import SCOPES, Depth, DepthConfig, DepthSchedule, deal
from pipeline.errors import ConfigError
from pipeline.flops import SequenceFlops
from pipeline.samplers import SAMPLERS, expectation
from pipeline.schedules import RampConfig, RampPoint

DRAWN = SAMPLERS[:6]


def schedule(seed: int = 1, **keys: Any) -> DepthSchedule:
    return DepthSchedule(DepthConfig(**keys), seed)


def test_moments_and_quantiles_are_the_reference_s() -> None:
    """Numbers measured on 4 million draws of the reference's sampler at mean parameter 32."""
    drawn = schedule().units(0, 0, 300_000)
    depths = drawn.sum(axis=1)
    assert depths.mean() == pytest.approx(32.97, abs=0.12)
    assert depths.std() == pytest.approx(17.9, abs=0.2)
    quantiles = np.quantile(depths, [0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    assert np.abs(quantiles - [4, 8, 12, 20, 29, 41, 67, 94]).max() <= 1
    assert np.quantile(depths, 0.999) == pytest.approx(136, abs=4)
    assert (depths <= 8).mean() == pytest.approx(0.014, abs=0.001)
    assert (depths > 64).mean() == pytest.approx(0.058, abs=0.002)
    np.testing.assert_array_equal(drawn[:, 1], np.minimum(depths, 8))


def test_the_depths_of_steps_have_the_same_law_as_those_of_units() -> None:
    depths = schedule(seed=7).lockstep(range(20_000)).sum(axis=1)
    assert depths.mean() == pytest.approx(32.97, abs=0.5)
    assert np.abs(np.quantile(depths, [0.01, 0.05, 0.25, 0.5, 0.75, 0.95]) - [8, 12, 20, 29, 41, 67]).max() <= 1.5


VARIANCES = {
    "lognormal_poisson": lambda m: m + m**2 * np.expm1(0.25),
    "poisson": lambda m: m,
    "negative_binomial": lambda m: m + m**2 * np.expm1(0.25),
    "uniform": lambda m: ((2 * m - 1) ** 2 - 1) / 12,
    "geometric": lambda m: m * (m - 1),
    "sobol": lambda m: ((2 * m - 1) ** 2 - 1) / 12,
}


@pytest.mark.parametrize("mean", [1, 5, 32, 400])
@pytest.mark.parametrize("sampler", DRAWN)
def test_every_law_has_its_expectation_and_variance(sampler: str, mean: int) -> None:
    draws = schedule(sampler=sampler, mean_recurrence=mean, mean_backprop_depth=1).units(3, 10**12, 40_000)
    depths = draws.sum(axis=1)
    sd = float(np.sqrt(VARIANCES[sampler](mean)))
    assert depths.min() >= 1
    assert depths.mean() == pytest.approx(expectation(sampler, mean), abs=4 * sd / 200 + 1e-9)
    assert depths.std() == pytest.approx(sd, rel=0.06)


def test_a_small_law_is_exact() -> None:
    depths = schedule(sampler="poisson", mean_recurrence=2, mean_backprop_depth=1).units(0, 0, 100_000).sum(axis=1)
    shares = np.bincount(depths, minlength=5)[1:5] / len(depths)
    assert shares == pytest.approx(np.exp(-2) * np.array([1, 2, 2, 4 / 3]), abs=0.005)


def test_sobol_spreads_every_power_of_two_of_steps_evenly() -> None:
    drawn = schedule(sampler="sobol", mean_recurrence=32, mean_backprop_depth=8)  # depths 1 to 63
    for start in (0, 64, 640):
        counts = np.bincount(drawn.lockstep(range(start, start + 64)).sum(axis=1), minlength=64)[1:]
        assert counts.max() <= 2
        assert counts.min() >= 1 or counts.sum() == 64


def test_laws_that_draw_nothing() -> None:
    assert schedule(sampler="fixed", mean_recurrence=6, mean_backprop_depth=4).at(9) == Depth(2, 4)
    assert schedule(sampler="full", mean_recurrence=12).at(9) == Depth(0, 12)
    assert schedule(sampler="non_recurrent", mean_recurrence=1, mean_backprop_depth=1).at(9) == Depth(0, 1)


def test_depths_are_pinned() -> None:
    """A run that resumes under another version of anything must draw what it would have drawn."""
    drawn = schedule(seed=233, mean_recurrence=8, mean_backprop_depth=4)
    assert [drawn.at(step) for step in range(4)] == [(0, 2), (0, 4), (4, 4), (0, 2)]
    assert drawn.balanced(5, 4) == BALANCED
    assert drawn.per_sequence(5, [0, 3]) == [BALANCED[0], BALANCED[3]]
    for sampler, depths in PINNED.items():
        other = schedule(seed=233, sampler=sampler, mean_recurrence=8, mean_backprop_depth=4)
        assert other.lockstep(range(6)).sum(axis=1).tolist() == depths


BALANCED = [Depth(26, 4), Depth(5, 4), Depth(0, 4), Depth(4, 4)]
PINNED = {
    "lognormal_poisson": [2, 4, 8, 2, 4, 4],
    "poisson": [7, 5, 6, 5, 9, 7],
    "negative_binomial": [5, 2, 3, 3, 8, 5],
    "uniform": [4, 1, 2, 1, 8, 4],
    "geometric": [12, 23, 17, 22, 5, 12],
    "sobol": [7, 14, 3, 11, 5, 12],
}


@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 10**7), first=st.integers(0, 10**13), data=st.data())
@pytest.mark.parametrize("sampler", DRAWN)
def test_a_unit_s_depth_does_not_depend_on_what_is_asked_with_it(
    sampler: str, seed: int, step: int, first: int, data: st.DataObject
) -> None:
    drawn = schedule(seed, sampler=sampler, mean_recurrence=8, mean_backprop_depth=4)
    together = drawn.per_sequence(step, range(first, first + 20))
    chosen = data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=5))
    assert drawn.per_sequence(step, [first + i for i in chosen]) == [together[i] for i in chosen]
    assert schedule(seed, sampler=sampler, mean_recurrence=8, mean_backprop_depth=4).at(step) == drawn.at(step)


def test_seeds_steps_and_units_are_streams_of_their_own() -> None:
    base = schedule(1).units(0, 0, 200).sum(1)
    others = [schedule(2).units(0, 0, 200), schedule(1).units(1, 0, 200), schedule(1).units(0, 1, 200)]
    assert all(abs(np.corrcoef(base, other.sum(1))[0, 1]) < 0.3 for other in others)


def test_curricula_move_the_mean_and_the_limit() -> None:
    config = DepthConfig(
        recurrence_ramp=RampConfig(kind="linear", start=8, steps=1000),
        backprop_ramp=RampConfig(kind="piecewise", start=2, points=[RampPoint(step=500, value=8.0)]),
    )
    drawn = DepthSchedule(config, 5).lockstep(range(3000))
    assert drawn[:500, 1].max() == 2
    assert drawn[500:, 1].max() == 8
    assert drawn[:100].sum(1).mean() == pytest.approx(9 + 1.2, abs=1.5)
    assert drawn[1000:].sum(1).mean() == pytest.approx(33, abs=1.5)
    same = DepthSchedule(DepthConfig(), 5).lockstep(range(1000, 1100))
    np.testing.assert_array_equal(drawn[1000:1100], same)  # past the ramp nothing tells that there was one


@pytest.mark.parametrize(
    ("ramp", "saving"),
    [
        (RampConfig(kind="linear", start=4, steps=2500), 0.069),
        (RampConfig(kind="sqrt", start=4, steps=7500), 0.28),
        (RampConfig(kind="piecewise", start=16, points=[RampPoint(step=5000, value=32.0)]), 0.147),
    ],
)
def test_curricula_save_core_passes(ramp: RampConfig, saving: float) -> None:
    core = SequenceFlops(outside=0.0, iteration=1.0, state_product=0.0, recomputed=1.0, recomputed_outside=0.0)

    def cost(config: DepthConfig) -> float:
        drawn = DepthSchedule(config, 3).lockstep(range(10_000)).tolist()
        return sum(core.training(Depth(*depth)) for depth in drawn)

    assert cost(DepthConfig()) / 10_000 == pytest.approx(57.0, abs=0.6)  # core passes a step
    assert 1 - cost(DepthConfig(recurrence_ramp=ramp)) / cost(DepthConfig()) == pytest.approx(saving, abs=0.012)


@given(
    ranks=st.integers(1, 12), share=st.integers(1, 6), seed=st.integers(0, 100),
)  # fmt: skip
def test_every_item_is_dealt_once_and_to_every_rank_equally_many(ranks: int, share: int, seed: int) -> None:
    costs = np.random.default_rng(seed).lognormal(0, 0.5, ranks * share).tolist()
    hands = deal(costs, ranks)
    assert sorted(item for hand in hands for item in hand) == list(range(len(costs)))
    assert {len(hand) for hand in hands} == {share}


def test_512_ranks_with_8_micro_batches_each_work_alike() -> None:
    drawn = schedule(seed=233)
    imbalance = []
    for step in range(12):
        costs = [6.0 + n + 4.0 * k for n, k in drawn.balanced(step, 512 * 8)]
        loads = [sum(costs[item] for item in hand) for hand in deal(costs, 512)]
        imbalance.append(max(loads) / np.mean(loads))
        # Ranks that meet at every micro-batch wait for the longest of each round: the costliest come first.
        rounds = np.array(costs)[np.array(deal(costs, 512))]
        assert rounds.max(axis=0).sum() / np.mean(loads) < 1.4
        assert (np.diff(rounds, axis=1) <= 0).all()
    assert np.mean(imbalance) <= 1.10


def test_the_digest_tells_schedules_apart() -> None:
    digests = [
        schedule(seed, scope=scope, mean_recurrence=mean).digest(range(16))
        for seed in (1, 2) for scope in SCOPES for mean in (32, 33)
    ]  # fmt: skip
    assert len(set(digests)) == len(digests)
    assert schedule(1).digest(range(16)) == schedule(1).digest(range(16))


@pytest.mark.parametrize(
    "change",
    [
        {"mean_recurrence": 0}, {"mean_recurrence": 10_001}, {"mean_backprop_depth": 0}, {"sigma": -1.0},
        {"sigma": 0.0, "sampler": "negative_binomial"}, {"sigma": 2.1}, {"sampler": "normal"}, {"scope": "rank"},
        {"mean_recurrence": 4, "sampler": "non_recurrent"}, {"scope": "balanced", "sampler": "fixed"},
        {"backprop_ramp": RampConfig(kind="linear", start=2, steps=9), "sampler": "full"},
        {
            "recurrence_ramp": RampConfig(kind="linear", start=5, steps=9), "mean_recurrence": 1,
            "mean_backprop_depth": 1, "sampler": "non_recurrent",
        },
    ],
)  # fmt: skip
def test_parameters_without_a_meaning_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"depth.{next(iter(change))}"):
        DepthConfig(**change)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mean_backprop_depth": 33}, "depth.mean_backprop_depth: 33 iterations .* exceed .* 32 at step 0"),
        ({"recurrence_ramp": RampConfig(kind="linear", start=4, steps=50)}, r"8 iterations .* of 4 .*at most 4"),
        (
            {"backprop_ramp": RampConfig(kind="piecewise", start=40, points=[RampPoint(step=9, value=8.0)])},
            "40 iterations",
        ),
        ({"recurrence_ramp": RampConfig(kind="linear", start=9, steps=500)}, r"depth.recurrence_ramp.steps: 500"),
        ({"backprop_ramp": RampConfig(kind="sqrt", start=0, steps=5)}, r"depth.backprop_ramp.start: 0"),
        ({"scope": "per_sequence"}, "depth.scope: per_sequence .* train.micro_batch_size is 1"),
    ],
)
def test_combinations_that_cannot_be_run_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DepthConfig(**keys).check(100, 1)


def test_both_ramps_together_and_full_backpropagation_pass_the_check() -> None:
    ramps = {name: RampConfig(kind="linear", start=s, steps=50) for name, s in (("recurrence", 4), ("backprop", 2))}
    DepthConfig(recurrence_ramp=ramps["recurrence"], backprop_ramp=ramps["backprop"]).check(100, 1)
    DepthConfig(sampler="full", mean_recurrence=4).check(100, 1)
    DepthConfig(scope="per_sequence").check(100, 2)
