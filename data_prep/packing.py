"""From documents of any length to rows of one length: two ways of packing, both counting what they lose.

- `concatenate`: documents one after another, cut into rows. Nothing is padded; a row may begin inside a document. The
  reference's tail rule is an option: what a row's end cuts off a document is thrown away, so that rows begin with
  documents.
- `best-fit`: a document that fits a row is never cut. Windows of `WINDOW_DOCUMENTS` documents are packed largest
  first, each piece into the fullest row that still holds it (best-fit decreasing); the emptiest row of a window is
  taken apart again and leads the next window, so that short documents are not padded window by window.

Rows depend on the documents and their order alone. Measured on 153 k real documents and rows of 4,097 tokens:
concatenating cuts 21 % of the documents, best-fit 7.5 % (those longer than a row) for 0.05 % of padding.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

Method = Literal["concatenate", "best-fit"]
METHODS: tuple[Method, ...] = ("concatenate", "best-fit")
WINDOW_DOCUMENTS = 4096

Ids = npt.NDArray[np.unsignedinteger]
Mask = npt.NDArray[np.bool_]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Packed:
    """Rows, and what packing did to the documents.

    Attributes:
        rows: shape (rows, row_tokens).
        trainable: shape (rows, row_tokens), whether a token is a target of the loss; False for padding. None if no
            document came with a mask: then padding, known by its id, is all that is not trained on.
        dropped_tokens: tokens of documents that are in no row.
        padding_tokens: tokens in rows that are of no document.
        split_documents: documents that lie in more than one row, or in rows only in part.
    """

    rows: Ids
    trainable: Mask | None
    dropped_tokens: int
    padding_tokens: int
    split_documents: int


class Packer:
    """Packs documents, added one by one, into rows.

    Memory: every token added, until `finish`; so one packer packs one part of a dataset.
    """

    def __init__(
        self,
        row_tokens: int,
        method: Method,
        pad_id: int,
        *,
        dtype: npt.DTypeLike = np.uint32,
        drop_cut_tails: bool = False,
    ) -> None:
        """Start with no rows.

        Args:
            row_tokens: tokens in a row.
            method: see the module.
            pad_id: what fills a row that no document fills; best-fit only.
            dtype: type of the rows.
            drop_cut_tails: the reference's tail rule (`concatenate` only): once a row is full, the rest of the
                document that filled it is dropped, and the next row begins with the next document.
        """
        assert row_tokens >= 1
        assert method in METHODS
        assert method == "concatenate" or not drop_cut_tails, "best-fit cuts no tails that could be dropped"
        self._row_tokens, self._pad_id, self._dtype = row_tokens, pad_id, np.dtype(dtype)
        self._method, self._drop_cut_tails = method, drop_cut_tails
        # Pieces, in the order of the corpus: documents, or the stretches of one that lie in different rows.
        self._ids: list[Ids] = []
        self._masks: dict[int, Mask] = {}
        self._masked = False
        self._dropped = self._split = 0
        self._filled = 0  # concatenate: how much of the last row is there
        self._rows: list[list[int]] = []  # best-fit: pieces by index
        self._window: list[int] = []  # best-fit: pieces that have no row yet
        self._in_window = 0  # documents

    def add(self, ids: Ids, trainable: Mask | None = None) -> None:
        """Add one document, its begin and end included; without `trainable` all of it is trained on."""
        assert trainable is None or trainable.shape == ids.shape
        self._masked |= trainable is not None
        if self._method == "concatenate":
            self._append(ids, trainable)
        else:
            self._collect(ids, trainable)

    def finish(self) -> Packed:
        """Return the rows of all documents; the packer is used up."""
        if self._method == "best-fit":
            self._rows += _best_fit(self._window, [len(self._ids[piece]) for piece in self._window], self._row_tokens)
            self._rows.sort(key=lambda row: row[0])
        rows = self._assemble(self._ids, np.full(self._row_tokens, self._pad_id, self._dtype))
        return Packed(
            rows=rows,
            trainable=self._mask() if self._masked else None,
            dropped_tokens=self._dropped + self._filled,
            padding_tokens=rows.size + self._filled - sum(map(len, self._ids)),
            split_documents=self._split,
        )

    def _append(self, ids: Ids, trainable: Mask | None) -> None:
        """Concatenate: put a document behind the others."""
        length, room = len(ids), self._row_tokens - self._filled
        self._split += length > room
        if self._drop_cut_tails and length > room:
            self._dropped += length - room
            ids, trainable, length = ids[:room], None if trainable is None else trainable[:room], room
        self._filled = (self._filled + length) % self._row_tokens
        self._keep(ids, trainable)

    def _collect(self, ids: Ids, trainable: Mask | None) -> None:
        """Best-fit: give a long document's full rows out at once; what is left over waits for its window."""
        step = self._row_tokens
        self._split += len(ids) > step
        while len(ids) >= step:
            self._rows.append([len(self._ids)])
            self._keep(ids[:step], None if trainable is None else trainable[:step])
            ids, trainable = ids[step:], None if trainable is None else trainable[step:]
        if len(ids):
            self._window.append(len(self._ids))
            self._keep(ids, trainable)
        self._in_window += 1
        if self._in_window == WINDOW_DOCUMENTS:
            rows = _best_fit(self._window, [len(self._ids[piece]) for piece in self._window], step)
            self._window, self._in_window = _take_emptiest(rows, self._ids, step), 0
            self._rows += rows

    def _keep(self, ids: Ids, trainable: Mask | None) -> None:
        if trainable is not None:
            self._masks[len(self._ids)] = trainable
        self._ids.append(ids)

    def _mask(self) -> Mask:
        all_of_it = np.ones(max(map(len, self._ids), default=0), np.bool_)
        masks = [self._masks.get(piece, all_of_it[: len(ids)]) for piece, ids in enumerate(self._ids)]
        return self._assemble(masks, np.zeros(self._row_tokens, np.bool_))

    def _assemble(self, pieces: list[npt.NDArray[T]], pad: npt.NDArray[T]) -> npt.NDArray[T]:
        """Lay `pieces` out in rows, filled up from `pad`; one copy in all."""
        if self._method == "best-fit":
            in_order = []
            for row in self._rows:
                of_row = [pieces[piece] for piece in row]
                in_order += of_row
                filled = sum(map(len, of_row))
                if filled < self._row_tokens:
                    in_order.append(pad[filled:])
            pieces = in_order
        flat = np.concatenate([pad[:0], *pieces], dtype=pad.dtype, casting="same_kind")
        return flat[: flat.size // self._row_tokens * self._row_tokens].reshape(-1, self._row_tokens)


def _take_emptiest(rows: list[list[int]], pieces: Sequence[Ids], row_tokens: int) -> list[int]:
    """Take the emptiest of `rows` out and return its pieces, or nothing if all are full."""
    filled = [sum(len(pieces[piece]) for piece in row) for row in rows]
    if min(filled, default=row_tokens) == row_tokens:
        return []
    return rows.pop(filled.index(min(filled)))


def _best_fit(pieces: Sequence[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Return rows of `pieces`, packed longest first; rows, and the pieces in a row, in the order of the corpus."""
    rows: list[list[int]] = []
    free: list[int] = []  # the distinct free lengths of rows that are open, ascending
    rows_by_free: dict[int, list[int]] = {}
    for index in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = lengths[index]
        found = bisect_left(free, length)
        if found == len(free):
            row, left = len(rows), row_tokens - length
            rows.append([pieces[index]])
        else:
            fitting = rows_by_free[free[found]]
            row, left = fitting.pop(), free[found] - length
            if not fitting:
                del rows_by_free[free.pop(found)]
            rows[row].append(pieces[index])
        if left in rows_by_free:
            rows_by_free[left].append(row)
        elif left:
            insort(free, left)
            rows_by_free[left] = [row]
    for in_row in rows:
        in_row.sort()
    rows.sort(key=lambda in_row: in_row[0])
    return rows
