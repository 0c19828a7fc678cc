"""A dataset of 10,000 shards, and 4,096 ranks on 1 T tokens: what opening costs, in time, memory and file operations.

The shards are real files of the right names and sizes, but sparse: nobody reads their rows. Ranks are simulated one
after another in this process; the broadcast is the message that mpi4py makes of the value.
    python -m benchmarks.data_scale
"""

from __future__ import annotations

import dataclasses
import gc
import os
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from mpi4py import MPI

from benchmarks.data_rows import ROW_TOKENS, write_dataset
from benchmarks.harness import arguments, machine, publish
from data_prep.manifest import Manifest, Part
from data_prep.shards import part_name, shard_bytes
from pipeline.loader import Loader, Share, TrainingData, contiguous
from pipeline.mixture import Mixture, Source

RANKS, BATCH = 4096, 4096


def main() -> None:
    options = arguments(__doc__ or "", shards=10_000, shard_rows=24_415)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "data"
        lay_out(directory, options.shards, options.shard_rows)
        facts = measure(directory)
    title = f"{options.shards:,} shards of {options.shard_rows:,} rows ({facts.pop('tokens') / 1e12:.2f} T tokens)"
    table = [(key, value) for key, value in facts.items()]
    publish(options.out, title, ("what", "value"), table, {"machine": machine(), "facts": facts})


def lay_out(directory: Path, shards: int, rows: int) -> None:
    """Write a manifest and sparse shards."""
    template = write_dataset(directory, np.zeros((1, ROW_TOKENS), np.uint16), 1)
    size = shard_bytes(rows, ROW_TOKENS * 2)
    parts = []
    for number in range(shards):
        part = directory / part_name(number)
        part.mkdir(exist_ok=True)
        (part / "zarr.json").write_text("{}")
        with (part / "c.0.0").open("wb") as file:
            file.truncate(size)
        parts.append(Part(part.name, rows, size, f"{number:064x}", 0))
    dataclasses.replace(template, parts=tuple(parts)).write(directory)


def measure(directory: Path) -> dict[str, Any]:
    with counted() as reading:
        seconds_read, manifest = timed(lambda: Manifest.read(directory))
    seconds_build, data = timed(lambda: training_data(directory, manifest))
    message = MPI.pickle.dumps(data)
    seconds_unpickle, _ = timed(lambda: MPI.pickle.loads(message))
    seconds_alone, _ = timed(lambda: data.check_shards(0, 1))
    with counted() as checking:
        data.check_shards(0, RANKS)
    memory, seconds_loader = loader_cost(data)
    inodes = 3 * len(manifest.parts) + 2
    terabytes = sum(part.bytes for part in manifest.parts) / 1e12
    seconds_order = same_batch(data.mixture)
    return {
        "tokens": manifest.rows * (ROW_TOKENS - 1),
        "manifest.json, MB": f"{(directory / 'manifest.json').stat().st_size / 1e6:.2f}",
        "rank 0: read and check the manifest, s": f"{seconds_read:.3f}",
        "rank 0: order and readiness, s": f"{seconds_build:.3f}",
        "rank 0: file operations": dict(reading),
        "broadcast, MB": f"{len(message) / 1e6:.2f}",
        "other ranks: unpickle the broadcast, s": f"{seconds_unpickle:.3f}",
        "loader of one rank, s": f"{seconds_loader:.3f}",
        "loader of one rank, MB (manifest included)": f"{memory / 1e6:.1f}",
        f"presence of all shards, by one rank of {RANKS:,}: operations": dict(checking),
        "presence of all shards, by a single rank, s": f"{seconds_alone:.3f}",
        "whole opening on a single rank, s": f"{seconds_read + seconds_build + seconds_alone + seconds_loader:.3f}",
        "state of the order, bytes": len(str(10**12)),
        "inodes": f"{inodes:,} ({inodes / terabytes:,.0f} a terabyte)",
        f"rows of a batch on {RANKS:,} ranks, equal to the whole: ms a rank": f"{seconds_order / RANKS * 1e3:.2f}",
    }


def training_data(directory: Path, manifest: Manifest) -> TrainingData:
    return TrainingData((directory,), (manifest,), Mixture([Source("all", manifest.rows)], 1))


def loader_cost(data: TrainingData) -> tuple[int, float]:
    """Return bytes and seconds of the loader that a rank makes from what it has received."""
    message = MPI.pickle.dumps(data)
    gc.collect()
    tracemalloc.start()
    loader = Loader(MPI.pickle.loads(message), 1)
    memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    loader.close()
    seconds, loader = timed(lambda: Loader(data, 1))
    loader.close()
    return memory, seconds


def same_batch(mixture: Mixture) -> float:
    """Locate the batch after 10^12 samples on every rank; return the seconds, once it is known to be the same batch."""
    consumed = 10**12
    whole = mixture.locate(consumed + np.arange(BATCH)).rows
    started = time.perf_counter()
    rows = [
        mixture.locate(Share(consumed, BATCH, contiguous(rank, RANKS, BATCH)).samples(1)).rows for rank in range(RANKS)
    ]
    seconds = time.perf_counter() - started
    assert np.array_equal(np.concatenate(rows), whole)
    assert len(np.unique(whole)) == BATCH
    return seconds


def timed(action: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    value = action()
    return time.perf_counter() - started, value


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the calls that open, look at or list files."""
    calls: Counter[str] = Counter()

    def counting(name: str, real: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            calls[name] += 1
            return real(*given, **options)

        return call

    import io

    names = [(os, name) for name in ("open", "stat", "lstat", "scandir", "listdir")] + [(io, "open")]
    patches = [mock.patch.object(module, name, counting(name, getattr(module, name))) for module, name in names]
    for patch in patches:
        patch.start()
    try:
        yield calls
    finally:
        for patch in patches:
            patch.stop()


if __name__ == "__main__":
    main()
