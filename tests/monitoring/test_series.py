"""Down-sampling keeps what people look for; smoothing does not lag."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.reading.series import smooth, thin

_finite = st.floats(-1e6, 1e6)


@given(y=st.lists(_finite, min_size=1, max_size=300), limit=st.integers(4, 60), data=st.data())
def test_thinning_keeps_ends_and_extremes_within_the_limit(y: list[float], limit: int, data: st.DataObject) -> None:
    x = sorted(data.draw(st.lists(_finite, min_size=len(y), max_size=len(y))))
    kept = thin(x, y, limit).tolist()
    assert len(kept) <= max(limit, 1)
    assert kept == sorted(set(kept))
    assert {kept[0], kept[-1]} == {0, len(y) - 1}
    assert (min(y[i] for i in kept), max(y[i] for i in kept)) == (min(y), max(y))
    if len(y) <= limit:
        assert kept == list(range(len(y)))


def test_every_spike_of_a_long_series_stays() -> None:
    spikes = range(777, 100_000, 9_999)
    y = [1.0] * 100_000
    for i in spikes:
        y[i] = 50.0
    assert set(spikes) <= set(thin(range(100_000), y, 4000).tolist())


@given(y=st.lists(_finite, min_size=1, max_size=100), span=st.floats(1, 50))
def test_smoothing_stays_between_the_extremes_and_has_no_direction(y: list[float], span: float) -> None:
    mean = smooth(y, span)
    assert len(mean) == len(y)
    assert min(y) - 1e-6 <= min(mean) <= max(mean) <= max(y) + 1e-6
    assert smooth(y[::-1], span)[::-1] == pytest.approx(mean, abs=1e-5)


def test_smoothing_a_long_series_is_the_same_sum() -> None:
    y = [float(i * 7919 % 101) for i in range(1000)]
    keep = 1 - 2 / 51
    weights = [keep ** abs(i - 500) for i in range(1000)]
    expected = sum(w * v for w, v in zip(weights, y, strict=True)) / sum(weights)
    assert smooth(y, 50)[500] == pytest.approx(expected)


def test_smoothing_does_not_lag_behind_a_steady_fall() -> None:
    falling = [float(-i) for i in range(400)]
    assert smooth(falling, 10)[100:300] == pytest.approx(falling[100:300])
