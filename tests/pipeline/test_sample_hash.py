"""The sample hash tells every other set of samples apart, and never how the ranks shared them out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sample_hash import batch_sums, roll
from tests.pipeline.expected_samples import expected_hashes


def rolled(batches: list[list[int]]) -> list[str]:
    hashes, state = [], ""
    for batch in batches:
        state = roll(state, batch_sums(batch).tolist())
        hashes.append(state)
    return hashes


def test_the_hash_is_what_it_is_said_to_be() -> None:
    batches = [list(range(8 * step, 8 * step + 8)) for step in range(5)]
    assert rolled(batches) == expected_hashes(batches)
    assert all(len(value) == 16 and int(value, 16) for value in rolled(batches))


@given(order=st.permutations(range(1000, 1024)), cuts=st.sets(st.integers(1, 23)), ranks=st.permutations(range(24)))
def test_ranks_micro_batches_and_their_order_do_not_change_it(
    order: list[int], cuts: set[int], ranks: list[int]
) -> None:
    edges = [0, *sorted(cuts), 24]
    parts = [batch_sums(order[start:end]) for start, end in pairwise(edges)]
    total = np.zeros(2)
    for rank in ranks:  # an all-reduce adds in whatever order it likes
        total += parts[rank] if rank < len(parts) else 0.0
    assert total.tolist() == batch_sums(range(1000, 1024)).tolist()


@pytest.mark.parametrize(
    "other",
    [
        [[0, 1, 2, 3], [4, 5, 6]],
        [[0, 1, 2, 3], [4, 5, 6, 6]],
        [[0, 1, 2, 4], [3, 5, 6, 7]],
        [[4, 5, 6, 7], [0, 1, 2, 3]],
        [[0, 1, 2, 3, 4, 5, 6, 7]],
        [[0, 1, 2, 3], [4, 5, 6, 7 + 2**32]],
        [[0, 3, 1, 2], [4, 4, 7, 7]],
    ],
)
def test_a_sample_left_out_fed_twice_or_moved_changes_it(other: list[list[int]]) -> None:
    assert rolled(other)[-1] != rolled([[0, 1, 2, 3], [4, 5, 6, 7]])[-1]


def test_a_resumed_run_goes_on_from_the_saved_hash() -> None:
    batches = [[0, 1], [2, 3], [4, 5]]
    saved = rolled(batches[:2])[-1]
    assert roll(saved, batch_sums(batches[2]).tolist()) == rolled(batches)[-1]


def test_sums_that_may_have_been_rounded_are_refused() -> None:
    largest = [float(2**21 * (2**32 - 1)), 0.0]
    assert largest[0] < 2**53
    assert roll("", largest)
    with pytest.raises(AssertionError, match="too large to be exact"):
        roll("", [2.0**53, 0.0])
