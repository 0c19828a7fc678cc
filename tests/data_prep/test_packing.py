from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import packing
from data_prep.packing import METHODS, Method, Packed, Packer

PAD = 2**32 - 1
Document = npt.NDArray[np.uint32]


def documents_of(lengths: list[int]) -> list[Document]:
    """Documents whose tokens are all different: token 1000 d + k is the k-th of document d."""
    return [np.arange(length, dtype=np.uint32) + 1000 * number for number, length in enumerate(lengths)]


def pack(documents: list[Document], row_tokens: int, method: Method, *, drop_cut_tails: bool = False) -> Packed:
    packer = Packer(row_tokens, method, PAD, drop_cut_tails=drop_cut_tails)
    for ids in documents:
        packer.add(ids)
    return packer.finish()


def stretches(row: Document) -> list[tuple[int, int, int]]:
    """The documents of a row as (document, first, last + 1), by their tokens one at a time."""
    found: list[tuple[int, int, int]] = []
    for token in row[row != PAD].tolist():
        document, offset = divmod(token, 1000)
        if found and found[-1][0] == document and found[-1][2] == offset:
            found[-1] = (document, found[-1][1], offset + 1)
        else:
            found.append((document, offset, offset + 1))
    return found


lengths = st.lists(st.integers(0, 40), max_size=60)
rows_of = st.integers(1, 17)


@given(lengths=lengths, row_tokens=rows_of, method=st.sampled_from(METHODS), window=st.integers(1, 9))
def test_no_token_is_lost_or_doubled_and_all_is_counted(
    lengths: list[int], row_tokens: int, method: Method, window: int
) -> None:
    documents = documents_of(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_DOCUMENTS", window)
        packed = pack(documents, row_tokens, method)
    stored = packed.rows[packed.rows != PAD]
    everything = np.concatenate([np.empty(0, np.uint32), *documents])
    assert packed.rows.shape[1:] == (row_tokens,)
    assert packed.padding_tokens == packed.rows.size - stored.size
    assert packed.dropped_tokens == everything.size - stored.size
    if method == "best-fit":
        assert packed.dropped_tokens == 0
        np.testing.assert_array_equal(np.sort(stored), everything)
    else:
        assert packed.dropped_tokens < row_tokens
        assert packed.padding_tokens == 0
        np.testing.assert_array_equal(stored, everything[: stored.size])
    rows_with = [{document for document, _, _ in stretches(row)} for row in packed.rows]
    in_part = {number for number, ids in enumerate(documents) if not np.isin(ids, stored).all()}
    split = {d for d in range(len(documents)) if sum(d in row for row in rows_with) + (d in in_part) > 1}
    assert packed.split_documents == len(split)


@given(lengths=lengths, row_tokens=rows_of, window=st.integers(1, 9))
def test_best_fit_cuts_only_documents_longer_than_a_row_and_keeps_their_order(
    lengths: list[int], row_tokens: int, window: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_DOCUMENTS", window)
        packed = pack(documents_of(lengths), row_tokens, "best-fit")
    assert packed.split_documents == sum(length > row_tokens for length in lengths)
    in_rows = [stretches(row) for row in packed.rows]
    for row in in_rows:
        assert row == sorted(row)
        for document, first, stop in row:
            assert lengths[document] > row_tokens or (first, stop) == (0, lengths[document])
    assert [row[0] for row in in_rows] == sorted(row[0] for row in in_rows)


@given(lengths=lengths, row_tokens=rows_of)
def test_no_two_rows_of_a_window_would_fit_into_one(lengths: list[int], row_tokens: int) -> None:
    packed = pack(documents_of(lengths), row_tokens, "best-fit")
    filled = (packed.rows != PAD).sum(axis=1).tolist()
    assert all(one + other > row_tokens for one, other in combinations(filled, 2))


@given(lengths=lengths, row_tokens=rows_of)
def test_the_reference_tail_rule_starts_every_row_with_a_document(lengths: list[int], row_tokens: int) -> None:
    documents = documents_of(lengths)
    packed = pack(documents, row_tokens, "concatenate", drop_cut_tails=True)
    expected: list[npt.NDArray[np.uint32]] = []
    block = np.empty(0, np.uint32)
    for ids in documents:
        block = np.concatenate([block, ids])
        if len(block) >= row_tokens:
            expected.append(block[:row_tokens])
            block = block[:0]
    np.testing.assert_array_equal(packed.rows, np.array(expected, np.uint32).reshape(-1, row_tokens))
    assert packed.dropped_tokens == sum(lengths) - packed.rows.size


@given(
    documents=st.lists(st.lists(st.booleans(), max_size=30), max_size=20),
    masked=st.sets(st.integers(0, 19), min_size=1),
    row_tokens=rows_of,
    method=st.sampled_from(METHODS),
)
def test_masks_follow_their_tokens(
    documents: list[list[bool]], masked: set[int], row_tokens: int, method: Method
) -> None:
    packer = Packer(row_tokens, method, PAD)
    expected: dict[int, bool] = {}
    for number, flags in enumerate(documents):
        ids = documents_of([0] * number + [len(flags)])[-1]
        packer.add(ids, np.array(flags, np.bool_) if number in masked else None)
        expected |= dict(zip(ids.tolist(), flags if number in masked else [True] * len(flags), strict=True))
    packed = packer.finish()
    if not any(number < len(documents) for number in masked):
        assert packed.trainable is None
        return
    assert packed.trainable is not None
    assert packed.trainable.shape == packed.rows.shape
    for token, flag in zip(packed.rows.ravel().tolist(), packed.trainable.ravel().tolist(), strict=True):
        assert flag == expected.get(token, False)


@pytest.mark.parametrize("median", [20, 300])
def test_little_is_padded_whether_documents_are_short_or_long(median: int) -> None:
    chosen = np.random.default_rng(0).lognormal(np.log(median), 1.5, 10_000)
    packer = Packer(4097, "best-fit", 0, dtype=np.uint16)
    for length in np.minimum(chosen.astype(int) + 2, 100_000):
        packer.add(np.ones(length, np.uint16))
    packed = packer.finish()
    assert packed.rows.dtype == np.uint16
    assert packed.padding_tokens < 0.005 * packed.rows.size


@pytest.mark.parametrize("method", METHODS)
def test_nothing_in_gives_no_rows(method: Method) -> None:
    packed = pack([], 5, method)
    assert packed.rows.shape == (0, 5)
    assert (packed.trainable, packed.dropped_tokens, packed.padding_tokens) == (None, 0, 0)
