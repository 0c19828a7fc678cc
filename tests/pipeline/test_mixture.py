"""Every sample has its place in the mixture, near its part at any time, found without the samples before it."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.mixture import LONGEST_PATTERN, Change, Mixture, Source, pattern_shares, spread

weights_of = st.lists(
    st.one_of(st.integers(1, 30).map(float), st.floats(1e-6, 1e3), st.sampled_from([0.1, 0.25, 0.7])),
    min_size=1,
    max_size=8,
)


def mixture_of(weights: list[float], rows: int = 50, changes: list[Change] | None = None) -> Mixture:
    sources = [Source(f"s{i}", rows + i, weight) for i, weight in enumerate(weights)]
    return Mixture(sources, seed=3, changes=changes or [])


@settings(max_examples=25, deadline=None)
@given(weights=weights_of)
def test_counts_stay_within_one_of_their_part_at_every_prefix(weights: list[float]) -> None:
    mixture = mixture_of(weights)
    shares = pattern_shares(weights)
    period = sum(shares)
    sources = mixture.locate(np.arange(min(2 * period, 70_000))).sources
    prefix = np.arange(1, sources.size + 1)
    for source, share in enumerate(shares):
        # In integers: |count - n share / period| < 1.
        assert np.abs(np.cumsum(sources == source) * period - prefix * share).max() < period


@given(weights=weights_of)
def test_weights_are_exact_where_a_pattern_can_hold_them_and_close_elsewhere(weights: list[float]) -> None:
    shares, total = pattern_shares(weights), sum(map(Fraction, map(repr, weights)))
    parts = [Fraction(repr(weight)) / total for weight in weights]
    period = sum(shares)
    assert period <= LONGEST_PATTERN
    assert all(share > 0 for share in shares)
    for share, part in zip(shares, parts, strict=True):
        assert abs(Fraction(share, period) - part) <= Fraction(len(weights), LONGEST_PATTERN)


def test_decimal_weights_are_what_they_look_like() -> None:
    assert pattern_shares([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert pattern_shares([3, 1, 0.25]) == [12, 4, 1]
    assert pattern_shares([1.0, 0.0]) == [1, 0]
    assert spread([7, 2, 1]).tolist() == [0, 0, 0, 1, 0, 0, 1, 0, 0, 2]


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.integers(0, 9).map(float), min_size=2, max_size=5).filter(any),
    later=st.lists(st.integers(0, 9).map(float), min_size=2, max_size=5).filter(any),
    change_at=st.integers(1, 300),
    limits=st.lists(st.one_of(st.none(), st.integers(1, 120)), min_size=5, max_size=5),
    cut=st.integers(0, 600),
)
def test_any_sample_is_found_as_if_all_before_it_had_been_counted(
    weights: list[float], later: list[float], change_at: int, limits: list[int | None], cut: int
) -> None:
    named = dict(zip((f"s{i}" for i in range(len(weights))), later, strict=False))
    sources = [Source(f"s{i}", 40 + i, weight, limits[i]) for i, weight in enumerate(weights)]
    try:
        mixture = Mixture(sources, 3, [Change(change_at, named)])
    except ConfigError:  # the change leaves no weight above 0
        return
    samples = np.arange(600 if mixture.length is None else min(mixture.length, 600))
    located = mixture.locate(samples)
    counted = np.zeros(len(sources), dtype=np.int64)
    for sample, source, ordinal in zip(samples, located.sources, located.ordinals, strict=True):
        if sample == cut:
            np.testing.assert_array_equal(mixture.counts(cut), counted)
        assert ordinal == counted[source]
        counted[source] += 1
    for source, count in zip(sources, counted, strict=True):
        assert source.limit is None or count <= source.limit
    alone = mixture.locate(samples[cut : cut + 1])
    assert alone.rows.tolist() == located.rows[cut : cut + 1].tolist()


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.integers(1, 9).map(float), min_size=1, max_size=4),
    consumed=st.integers(0, 10**12),
    world_size=st.sampled_from([1, 2, 3, 8]),
)
def test_a_global_batch_is_the_same_for_any_number_of_ranks(
    weights: list[float], consumed: int, world_size: int
) -> None:
    mixture, batch = mixture_of(weights), 24
    share = batch // world_size
    whole = mixture.locate(consumed + np.arange(batch))
    parts = [mixture.locate(consumed + rank * share + np.arange(share)) for rank in range(world_size)]
    for name in ("sources", "ordinals", "rows"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


def test_every_row_of_every_source_comes_once_an_epoch() -> None:
    mixture = Mixture([Source("a", 30, 3), Source("b", 20, 1)], 7)
    located = mixture.locate(np.arange(4 * 60))
    for source, rows in ((0, 30), (1, 20)):
        own = located.rows[located.sources == source]
        for epoch in range(own.size // rows):
            assert sorted(own[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_sources_of_one_size_are_ordered_independently() -> None:
    located = Mixture([Source("a", 1000), Source("b", 1000)], 7).locate(np.arange(2000))
    assert np.mean(located.rows[located.sources == 0] == located.rows[located.sources == 1]) < 0.01


def test_a_source_at_its_limit_leaves_its_part_to_the_others() -> None:
    mixture = Mixture([Source("a", 100, 2, limit=10), Source("b", 100, 1), Source("c", 100, 1)], 0)
    located = mixture.locate(np.arange(1000))
    assert np.flatnonzero(located.sources == 0).max() < 20
    assert mixture.counts(1019).tolist() == [10, 505, 504]
    assert mixture.length is None


def test_a_mixture_ends_when_every_source_has_reached_its_limit() -> None:
    mixture = Mixture([Source("a", 100, 2, limit=10), Source("b", 100, 1, limit=50), Source("c", 9, 0)], 0)
    assert mixture.length == 60
    assert mixture.counts(60).tolist() == [10, 50, 0]


def test_weights_change_at_their_sample_and_not_named_ones_stay() -> None:
    mixture = mixture_of([1, 1, 0], changes=[Change(100, {"s2": 2.0}), Change(200, {"s0": 0.0, "s1": 0.0})])
    assert mixture.counts(100).tolist() == [50, 50, 0]
    assert mixture.counts(200).tolist() == [75, 75, 50]
    assert mixture.counts(300).tolist() == [75, 75, 150]
    assert mixture.locate([99, 100, 10**12]).sources.tolist()[-1] == 2


def test_the_past_is_in_the_fingerprint_and_the_future_is_not() -> None:
    sources = [Source("a", 10, 1.0, fingerprint="A"), Source("b", 10, 1.0, fingerprint="B")]
    now = Mixture(sources, 0)
    later = Mixture([*sources, Source("c", 10, 0.0, fingerprint="C")], 0, [Change(500, {"c": 5.0})])
    assert now.fingerprint(0) == now.fingerprint(500) == later.fingerprint(0) == later.fingerprint(500)
    assert later.fingerprint(501) != now.fingerprint(501)
    heavier = Mixture([dataclasses.replace(sources[0], weight=2.0), sources[1]], 0)
    other = Mixture([dataclasses.replace(sources[0], fingerprint="X"), sources[1]], 0)
    assert len({mixture.fingerprint(8) for mixture in (now, heavier, other)}) == 3
    renamed = Mixture([dataclasses.replace(source, name=source.name * 2) for source in sources], 0)
    assert renamed.fingerprint(8) == now.fingerprint(8)
    assert Mixture(sources[:1], 0).fingerprint(8) == "A"


def test_the_order_is_pinned_since_resumed_runs_depend_on_it() -> None:
    located = Mixture([Source("a", 100, 0.7), Source("b", 50, 0.3)], 11).locate([0, 1, 2, 3, 10**12])
    assert located.sources.tolist() == [0, 0, 1, 0, 0]
    assert located.ordinals.tolist() == [0, 1, 0, 2, 700_000_000_000]
    assert located.rows.tolist() == [99, 33, 26, 67, 77]


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ([0.0, 0.0], [], r"data\.train: no dataset has a weight above 0; .* s0, s1"),
        ([-1.0, 2.0], [], r"data\.train: the weight -1\.0 of s0"),
        ([float("nan"), 2.0], [], r"data\.train: the weight nan of s0"),
        ([1.0, 1.0], [Change(0, {})], r"data\.schedule\[0\]\.sample: 0 does not come after 0"),
        ([1.0, 1.0], [Change(9, {}), Change(9, {})], r"data\.schedule\[1\]\.sample: 9"),
        ([1.0, 1.0], [Change(9, {"x": 1.0})], r"data\.schedule\[0\]\.weights\.x: no such dataset .* s0, s1"),
        ([1.0, 1.0], [Change(9, {"s0": 0.0, "s1": 0.0})], r"data\.schedule\[0\]: no dataset has a weight"),
    ],
)
def test_mixtures_without_a_meaning_are_refused(weights: list[float], changes: list[Change], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixture_of(weights, changes=changes)
