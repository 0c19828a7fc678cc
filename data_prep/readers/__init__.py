"""From files to documents: Parquet, JSON lines, text and source trees, plain or compressed, in bounded memory.

`plan_items` cuts the inputs into work items, `read_item` streams the documents of one; `read_documents` does both.
Memory of a reader: a block of 1 MiB and two documents (`ReaderOptions.max_document_bytes`) for lines and text; the
pages being decoded and 8 MiB of rows for Parquet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.readers.items import Document, OnBad, ReaderOptions, Turn, WorkItem, fail, refuse_changed
from data_prep.readers.lines import read_jsonl, read_lines, read_text
from data_prep.readers.parquet import read_parquet
from data_prep.readers.planning import ITEM_BYTES, plan_items

__all__ = [
    "ITEM_BYTES",
    "Document",
    "ReaderOptions",
    "Turn",
    "WorkItem",
    "plan_items",
    "read_documents",
    "read_item",
]

_READERS = {"text": read_text, "lines": read_lines, "jsonl": read_jsonl, "parquet": read_parquet}


def read_item(item: WorkItem, options: ReaderOptions | None = None, on_bad: OnBad = fail) -> Iterator[Document]:
    """Yield the documents of one work item, in the order of the file.

    Args:
        item: what to read.
        options: how; those that `item` was planned with.
        on_bad: called with the problem of each document that cannot be used; reading goes on where it returns. A file
            that is damaged in its middle is one problem, and its readable beginning has been yielded.

    Raises:
        DataError: a document cannot be used and `on_bad` raises; or the file has changed since it was planned, be
            it while it was read.
    """
    refuse_changed(item)
    yield from _READERS[item.format](item, options or ReaderOptions(), on_bad)
    refuse_changed(item)  # meanwhile


def read_documents(
    inputs: Sequence[Path], options: ReaderOptions | None = None, on_bad: OnBad = fail
) -> Iterator[Document]:
    """Yield every document of `inputs` in order; see `plan_items` and `read_item`."""
    for item in plan_items(inputs, options):
        yield from read_item(item, options, on_bad)
