"""Learning rate, batch size and ramps are functions of the step, and the closed forms agree with counting."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.schedules import (
    RATE_KINDS,
    RampConfig,
    RampPoint,
    ScheduleConfig,
    batch_size,
    learning_rate_ratio,
    samples_before,
)


def ratios(steps: int, **keys: object) -> list[float]:
    config = ScheduleConfig(**keys)  # type: ignore[arg-type]
    return [learning_rate_ratio(config, step, steps) for step in range(steps)]


def test_the_trapezoid_rises_stays_and_falls() -> None:
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert ratios(12, warmup_steps=3, cooldown_steps=4) == pytest.approx(expected)


def test_without_warm_up_and_cooldown_the_rate_is_constant() -> None:
    assert set(ratios(7)) == {1.0}


@pytest.mark.parametrize(
    ("kind", "middle"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - np.sqrt(0.5))], ids=["linear", "cosine", "sqrt"]
)
def test_the_other_kinds_fall_from_the_warm_up_to_the_end(kind: str, middle: float) -> None:
    rates = ratios(1104, kind=kind, warmup_steps=4, min_ratio=0.1)
    assert rates[3] == pytest.approx(0.8)
    assert rates[4] == 1.0
    assert rates[4 + 550] == pytest.approx(0.1 + 0.9 * middle)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0.1, abs=2e-3)


def test_a_cooldown_holds_the_peak_before_it_in_every_kind() -> None:
    for kind in RATE_KINDS:
        rates = ratios(100, kind=kind, cooldown_steps=20)
        assert set(rates[:80]) == {1.0}
        assert all(a > b > 0.0 for a, b in pairwise(rates[80:]))


@given(
    start=st.integers(1, 40), increment=st.integers(1, 12), increments=st.integers(0, 9),
    ramp=st.integers(1, 60), step=st.integers(0, 90),
)  # fmt: skip
def test_samples_before_a_step_are_the_sum_of_the_batches(
    start: int, increment: int, increments: int, ramp: int, step: int
) -> None:
    final = start + increment * increments
    config = ScheduleConfig(batch_start=start, batch_increment=increment, batch_ramp_steps=ramp)
    config.check_batch(final)
    sizes = [batch_size(config, final, number) for number in range(step)]
    assert samples_before(config, final, step) == sum(sizes)
    assert sizes == sorted(sizes)
    assert all((size - start) % increment == 0 and start <= size <= final for size in sizes)
    assert batch_size(config, final, ramp) == final


def test_a_ramp_takes_equal_steps_at_equal_intervals() -> None:
    config = ScheduleConfig(batch_start=4, batch_increment=2, batch_ramp_steps=9)
    assert [batch_size(config, 10, step) for step in range(11)] == [4, 4, 4, 6, 6, 6, 8, 8, 8, 10, 10]
    assert samples_before(ScheduleConfig(), 10, 7) == 70


def test_ramps_reach_their_end_on_their_way() -> None:
    steps = np.arange(0, 101)
    linear = RampConfig(kind="linear", start=4, steps=100).values(steps, 32)
    assert linear[[0, 50, 100]].tolist() == [4, 18, 32]
    slow = RampConfig(kind="sqrt", start=4, steps=100).values(steps, 32)
    assert slow[[0, 75, 100]].tolist() == [4, 18, 32]
    assert (slow <= linear).all()
    points = [RampPoint(step=10, value=16.0), RampPoint(step=50, value=32.0)]
    pieces = RampConfig(kind="piecewise", start=8, points=points).values([0, 9, 10, 49, 50, 1000], 32)
    assert pieces.tolist() == [8, 8, 16, 16, 32, 32]
    assert RampConfig().values([0, 5], 7).tolist() == [7, 7]


@pytest.mark.parametrize(
    ("keys", "field", "words"),
    [
        ({"kind": "cubic"}, "kind", "'cubic' is not one of constant, linear"),
        ({"start": 3.0}, "start", "3.0 with kind constant"),
        ({"kind": "linear", "steps": 5}, "start", "None with kind linear"),
        ({"kind": "linear", "start": 0.5, "steps": 5}, "start", "below 1"),
        ({"kind": "linear", "start": 4.0}, "steps", "0 with kind linear"),
        ({"kind": "linear", "start": 4.0, "steps": 101}, "steps", "101 exceed train.steps = 100"),
        ({"kind": "piecewise", "start": 4.0}, "points", "0 of them"),
        ({"kind": "piecewise", "start": 4.0, "points": [(9, 8.0), (9, 32.0)]}, "points", "do not ascend"),
        ({"kind": "piecewise", "start": 4.0, "points": [(9, 8.0)]}, "points", "not at the final 32"),
        ({"kind": "piecewise", "start": 4.0, "points": [(101, 32.0)]}, "points", "exceeds train.steps = 100"),
    ],
)
def test_ramps_without_a_meaning_have_a_problem(keys: dict[str, Any], field: str, words: str) -> None:
    points = [RampPoint(step=step, value=value) for step, value in keys.get("points", [])]
    problem = RampConfig(**{**keys, "points": points}).problem(32, 100)
    assert problem is not None
    assert problem[0] == field
    assert words in problem[1]


@pytest.mark.parametrize(
    "keys",
    [
        {"kind": "wavy"}, {"warmup_steps": -1}, {"cooldown_steps": -1}, {"min_ratio": 1.5}, {"batch_increment": 4},
        {"batch_start": 0, "batch_increment": 4, "batch_ramp_steps": 4}, {"batch_ramp_steps": 3},
    ],
)  # fmt: skip
def test_schedules_without_a_meaning_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"schedule.{next(iter(keys))}"):
        ScheduleConfig(**keys)  # type: ignore[arg-type]


def test_a_batch_ramp_that_misses_its_end_is_refused() -> None:
    config = ScheduleConfig(batch_start=4, batch_increment=4, batch_ramp_steps=9)
    config.check_batch(16)
    for final in (18, 2):
        with pytest.raises(ConfigError, match=f"train.global_batch_size = {final}"):
            config.check_batch(final)
