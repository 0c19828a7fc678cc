"""From documents to a dataset, on any number of ranks: the bytes that come out depend on the input alone.

The documents, in the order of `find_documents`, are cut into work units of whole documents. A unit is encoded by one
rank and becomes one part; its last tokens, too few for a row, are dropped and counted. The cuts depend on the corpus
and never on the ranks, which only share the units out among themselves.
"""

from __future__ import annotations

import heapq
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.corpus import find_documents, read_document
from data_prep.errors import DataError
from data_prep.files import partial_directory, publish
from data_prep.manifest import Manifest, Part, smallest_dtype
from data_prep.shards import part_name, write_part
from data_prep.tokenizer import Tokenizer, use_threads
from data_prep.world import World

_MEBIBYTE = 2**20
_BATCH_BYTES = _MEBIBYTE  # text that goes to the encoder at once
_SMALLEST_UNIT, _LARGEST_UNIT = _MEBIBYTE // 2, 256 * _MEBIBYTE  # of text; the largest bounds the memory of a rank
_UNITS_IF_POSSIBLE = 1024  # enough to share out evenly, few enough to keep shards large
_TEXT_BYTES_PER_TOKEN = 4  # typical; only the size of units depends on it
_ROWS_PER_UNIT = 64  # at least, so that dropped tails stay under 1 % of the tokens


@dataclass(frozen=True)
class BuildReport:
    """How far one rank's share of a build is; given to the `progress` callback after every batch.

    Attributes:
        bytes_done, bytes_total: text of this rank's share, bytes.
        documents_done, documents_total: documents of this rank's share.
    """

    bytes_done: int
    bytes_total: int
    documents_done: int
    documents_total: int


@dataclass(frozen=True)
class _Document:
    path: Path
    size: int  # bytes


@dataclass(frozen=True)
class _Unit:
    index: int
    documents: tuple[_Document, ...]

    @property
    def size(self) -> int:
        return sum(document.size for document in self.documents)


@dataclass(frozen=True)
class _Result:
    """What became of one unit; `part` is None where the unit filled no row."""

    index: int
    part: Part | None
    documents: int
    dropped_tokens: int
    text_bytes: int


def build_dataset(
    inputs: Sequence[Path],
    tokenizer_dir: Path,
    sequence_length: int,
    out: Path,
    world: World,
    *,
    unit_bytes: int | None = None,
    progress: Callable[[BuildReport], None] | None = None,
) -> Manifest:
    """Encode the documents of `inputs` into rows of `sequence_length` + 1 tokens and write the dataset `out`.

    Each document becomes begin + tokens + end; the documents of a unit are concatenated and cut into disjoint rows.
    A collective: every rank of `world` calls it with the same arguments and gets the same manifest. `out` appears
    when everything is on disk, or not at all.

    Args:
        inputs: files, directories and `.list` files, see `find_documents`.
        tokenizer_dir: directory of a tokenizer.json.
        sequence_length: tokens a row trains on, at least 1.
        out: directory to make; it must not exist.
        world: the ranks that share the work.
        unit_bytes: text in a work unit, bytes; chosen from the size of the corpus if None. Another value gives
            another dataset, since each unit drops its own tail.
        progress: called on every rank, after every batch, with that rank's progress.

    Raises:
        DataError: bad arguments, a bad document, or text for less than one row; the same message on every rank, and
            nothing is left behind.
    """
    tokenizer, units = _prepare(inputs, tokenizer_dir, sequence_length, world, unit_bytes)
    partial: Path | None = None
    try:
        with world.guard("create output"):
            partial = partial_directory(out) if world.rank == 0 else None
        partial = world.broadcast(partial)
        assert partial is not None
        with world.guard("tokenize"):
            results, histogram = _run_units(_share(units, world), tokenizer, sequence_length + 1, partial, progress)
        all_results = [result for of_rank in world.allgather(results) for result in of_rank]
        histogram = world.sum(histogram)
        with world.guard("write manifest"):
            manifest = _manifest(all_results, histogram, tokenizer, sequence_length)
            if world.rank == 0:
                manifest.write(partial)
                publish(partial, out)
    except BaseException:
        # A guard has stopped every rank before it raises, so nobody writes below this directory any more.
        if world.rank == 0 and partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _prepare(
    inputs: Sequence[Path], tokenizer_dir: Path, sequence_length: int, world: World, unit_bytes: int | None
) -> tuple[Tokenizer, list[_Unit]]:
    """Check everything that can be checked before anything is written; list the documents on rank 0."""
    units: list[_Unit] = []
    with world.guard("check arguments"):
        if sequence_length < 1:
            raise DataError(f"--sequence-length {sequence_length}: a row needs at least 1 token to train on")
        use_threads(world.size == 1)  # ranks share the cores already
        tokenizer = Tokenizer.load(tokenizer_dir)
        if world.rank == 0:
            documents = [_Document(path, path.stat().st_size) for path in find_documents(inputs)]
            _refuse_short_corpus(documents, sequence_length)
            units = _cut(documents, unit_bytes or _unit_bytes(documents, sequence_length))
    return tokenizer, world.broadcast(units)


def _refuse_short_corpus(documents: Sequence[_Document], sequence_length: int) -> None:
    # A byte-level token is at least one byte long, and every document gets a begin and an end.
    most_tokens = sum(document.size + 2 for document in documents)
    if most_tokens <= sequence_length:
        raise _too_short(sequence_length, f"its {len(documents)} documents hold at most {most_tokens} tokens")


def _too_short(sequence_length: int, found: str) -> DataError:
    return DataError(
        f"--sequence-length {sequence_length}: the corpus does not fill one row of {sequence_length + 1} tokens"
        f" ({found}); add text or choose shorter rows"
    )


def _unit_bytes(documents: Sequence[_Document], sequence_length: int) -> int:
    total = sum(document.size for document in documents)
    smallest = max(_SMALLEST_UNIT, _ROWS_PER_UNIT * (sequence_length + 1) * _TEXT_BYTES_PER_TOKEN)
    return max(smallest, min(total // _UNITS_IF_POSSIBLE, _LARGEST_UNIT))


def _cut(documents: Sequence[_Document], unit_bytes: int) -> list[_Unit]:
    """Cut the corpus evenly: a document belongs to the unit in whose share of the bytes it starts."""
    total = sum(document.size for document in documents)
    pieces = max(1, round(total / unit_bytes))
    members: dict[int, list[_Document]] = {}
    start = 0
    for document in documents:
        members.setdefault(min(start * pieces // max(total, 1), pieces - 1), []).append(document)
        start += document.size
    return [_Unit(index, tuple(unit)) for index, unit in enumerate(members.values())]


def _share(units: Sequence[_Unit], world: World) -> list[_Unit]:
    """Return this rank's units: largest first, each to the rank with the least so far."""
    loads = [(0, rank) for rank in range(world.size)]
    mine = []
    for unit in sorted(units, key=lambda unit: (-unit.size, unit.index)):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + unit.size, rank))
        if rank == world.rank:
            mine.append(unit)
    return mine


def _run_units(
    units: Sequence[_Unit],
    tokenizer: Tokenizer,
    row_tokens: int,
    directory: Path,
    progress: Callable[[BuildReport], None] | None,
) -> tuple[list[_Result], npt.NDArray[np.float64]]:
    """Encode and write `units`; return their results and how often each token was stored, shape (vocab_size,)."""
    histogram = np.zeros(tokenizer.vocab_size)
    results = []
    bytes_total = sum(unit.size for unit in units)
    documents_total = sum(len(unit.documents) for unit in units)
    bytes_done = documents_done = 0
    for unit in units:
        pieces: list[npt.NDArray[Any]] = []
        text_bytes = 0
        for batch in _batches(unit):
            texts = [read_document(document.path) for document in batch]
            pieces += _with_control_tokens(tokenizer.encode_batch(texts), tokenizer)
            text_bytes += sum(len(text.encode()) for text in texts)
            documents_done += len(batch)
            bytes_done += sum(document.size for document in batch)
            if progress is not None:
                progress(BuildReport(bytes_done, bytes_total, documents_done, documents_total))
        tokens = np.concatenate(pieces)
        count = len(tokens) // row_tokens
        rows = tokens[: count * row_tokens].reshape(count, row_tokens)
        part = write_part(directory, part_name(unit.index), rows) if count else None
        histogram += np.bincount(rows.ravel(), minlength=tokenizer.vocab_size)
        results.append(_Result(unit.index, part, len(unit.documents), len(tokens) - rows.size, text_bytes))
    return results, histogram


def _batches(unit: _Unit) -> Iterator[list[_Document]]:
    batch: list[_Document] = []
    size = 0
    for document in unit.documents:
        batch.append(document)
        size += document.size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _with_control_tokens(encoded: Sequence[npt.NDArray[np.uint32]], tokenizer: Tokenizer) -> list[npt.NDArray[Any]]:
    """Return begin, tokens, end of each document as arrays of the type on disk, to be concatenated."""
    dtype = np.dtype(smallest_dtype(tokenizer.vocab_size))
    begin, end = np.array([tokenizer.begin_id], dtype), np.array([tokenizer.end_id], dtype)
    return [piece for ids in encoded for piece in (begin, ids.astype(dtype), end)]


def _manifest(
    results: Sequence[_Result], histogram: npt.NDArray[np.float64], tokenizer: Tokenizer, sequence_length: int
) -> Manifest:
    in_order = sorted(results, key=lambda result: result.index)
    parts = tuple(result.part for result in in_order if result.part is not None)
    dropped = sum(result.dropped_tokens for result in in_order)
    if not parts:
        raise _too_short(sequence_length, f"{dropped} tokens in {len(in_order)} work units")
    return Manifest(
        sequence_length=sequence_length,
        dtype=smallest_dtype(tokenizer.vocab_size),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        documents=sum(result.documents for result in in_order),
        dropped_tokens=dropped,
        text_bytes=sum(result.text_bytes for result in in_order),
        unigram_entropy=_entropy(histogram),
        parts=parts,
    )


def _entropy(histogram: npt.NDArray[np.float64]) -> float:
    """Return the entropy of the counts in nats, equal on every machine: exact sum, no vectorised logarithm."""
    total = float(histogram.sum())
    shares = [float(count) / total for count in histogram if count > 0]
    return round(math.fsum(-share * math.log(share) for share in shares), 9) + 0.0
