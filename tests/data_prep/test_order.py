import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.order import Permutation, sample_rows


@given(size=st.integers(1, 5000), key=st.lists(st.integers(-(2**63), 2**64), max_size=3).map(tuple))
def test_every_index_has_its_own_image(size: int, key: tuple[int, ...]) -> None:
    images = Permutation(size, key).apply(np.arange(size))
    np.testing.assert_array_equal(np.sort(images), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 2**16, 2**16 + 1, 999_983])
def test_edges_and_a_large_prime_are_permuted_too(size: int) -> None:
    images = Permutation(size, (1,)).apply(np.arange(size))
    np.testing.assert_array_equal(np.sort(images), np.arange(size))


def test_the_order_is_pinned_since_resumed_runs_depend_on_it() -> None:
    assert Permutation(10, (1, 2)).apply(np.arange(10)).tolist() == [9, 5, 1, 4, 6, 8, 7, 2, 3, 0]
    assert sample_rows(np.array([0, 1, 999, 1000, 10**12]), 1000, 7).tolist() == [215, 909, 515, 149, 97]
    assert Permutation(10**12, (5,)).apply(np.array([0, 10**12 - 1])).tolist() == [138827562682, 721890407168]


@given(rows=st.integers(2, 200), seed=st.integers(0, 2**63), epochs=st.integers(1, 4), cut=st.floats(0, 1))
def test_each_epoch_sees_every_row_once_however_the_samples_are_split(
    rows: int, seed: int, epochs: int, cut: float
) -> None:
    samples = np.arange(rows * epochs)
    whole = sample_rows(samples, rows, seed)
    for epoch in whole.reshape(epochs, rows):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(rows))
    middle = int(cut * samples.size)
    split = np.concatenate([sample_rows(samples[:middle], rows, seed), sample_rows(samples[middle:], rows, seed)])
    np.testing.assert_array_equal(split, whole)


def test_epochs_seeds_and_sizes_are_ordered_independently() -> None:
    orders = [sample_rows(np.arange(1000) + 1000 * epoch, 1000, seed) for seed in (0, 1) for epoch in (0, 1)]
    orders.append(sample_rows(np.arange(1000), 1001, 0))
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.mean(one == other) < 0.01


def test_neighbours_are_scattered_evenly() -> None:
    rows = 2**16 - 17
    order = sample_rows(np.arange(rows), rows, 3).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    # The first tenth of an epoch, in 64 bins: chi-square over its degrees of freedom is 1 +- 0.18.
    counts, _ = np.histogram(order[: rows // 10], bins=64, range=(0, rows))
    expected = counts.sum() / 64
    assert ((counts - expected) ** 2 / expected).sum() / 63 < 1.6


def test_the_shape_is_kept() -> None:
    samples = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(sample_rows(samples, 100, 0).ravel(), sample_rows(samples.ravel(), 100, 0))
    assert sample_rows(samples, 100, 0).shape == (3, 4)


def test_a_sample_far_beyond_the_first_epoch_has_its_row_at_once() -> None:
    rows = 244_140_625
    far = np.array([10**12, 10**12 + 1])
    chosen = sample_rows(far, rows, 1)
    assert ((chosen >= 0) & (chosen < rows)).all()
    epoch, position = divmod(10**12, rows)
    assert chosen[0] == Permutation(rows, (1, epoch, 0)).apply(np.array([position]))[0]


def test_an_index_outside_is_a_programmers_error() -> None:
    with pytest.raises(AssertionError):
        Permutation(10, (0,)).apply(np.array([10]))
    with pytest.raises(AssertionError):
        Permutation(10, (0,)).apply(np.array([-1]))
