"""Rows read a second: the row reader, and others on the same rows, in a random order and one after another.

The others: bare np.memmap (raw rows, nothing checked); zarr and tensorstore on the very shards; and the reference's way
(recpre/huggingface_dataset.py): Parquet of int32 lists, row groups of 1,000, of which it turns one into Python lists.
Peers are taken from the environment or from --peers; one that is missing is left out and said so:
    pip install --target PEERS --no-deps tensorstore ml_dtypes pyarrow
    python -m benchmarks.data_rows --peers PEERS
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from benchmarks.harness import arguments, in_turn, machine, median, publish, ratio
from data_prep.manifest import Manifest
from data_prep.shards import RowReader, part_name, write_part

ROW_TOKENS, VOCABULARY, BATCH = 4097, 65_536, 64
Cases = dict[str, Callable[[], float]]


def main() -> None:
    options = arguments(__doc__ or "", rows=16_384, parts=2, rounds=7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = zipf_rows(options.rows)
        manifest = write_dataset(folder / "data", rows, options.parts)
        rows.tofile(folder / "raw")
        reader = RowReader(folder / "data", manifest)
        raw: Any = np.memmap(folder / "raw", np.uint16, "r").reshape(rows.shape)
        arrays = [zarr.open_array(folder / "data" / part.path, mode="r") for part in manifest.parts]
        per_part = options.rows // options.parts
        random: Cases = {
            "row reader": lambda: timed(random_batches(options.rows, options.rows), lambda w: as_batch(reader.rows(w))),
            "row reader, row by row": lambda: timed(
                random_batches(options.rows, 4096), lambda w: [as_batch(reader.row(int(i))) for i in w]
            ),
            "memmap": lambda: timed(random_batches(options.rows, options.rows), lambda w: as_batch(raw[w])),
            "memmap, row by row": lambda: timed(
                random_batches(options.rows, 4096), lambda w: [as_batch(raw[i]) for i in w]
            ),
            "zarr": lambda: timed(
                random_batches(per_part, 512), lambda w: as_batch(np.asarray(arrays[0].oindex[w, :]))
            ),
        }
        sequential: Cases = {
            "row reader": lambda: timed(runs(options.rows, 256), reader.rows),
            "memmap": lambda: timed(runs(options.rows, 256), lambda w: np.array(raw[w[0] : w[-1] + 1])),
            "zarr": lambda: timed(runs(per_part, 256)[:8], lambda w: arrays[0][int(w[0]) : int(w[-1]) + 1]),
        }
        missing = add_tensorstore(random, sequential, folder / "data" / manifest.parts[0].path, per_part)
        missing += add_parquet(random, folder / "parquet", rows)
        for case in (*random.values(), *sequential.values()):
            case()  # into the page cache
        report(options, in_turn(random, options.rounds), in_turn(sequential, options.rounds), missing)


def report(
    options: Any, random: dict[str, list[float]], sequential: dict[str, list[float]], missing: list[str]
) -> None:
    table = [
        [
            order,
            name,
            f"{median(rates):,.0f}",
            f"{median(rates) * ROW_TOKENS * 2 / 1e9:.3f}",
            f"{ratio(best, rates):.2f}",
        ]
        for order, results in (("random", random), ("sequential", sequential))
        for best in [results["row reader"]]
        for name, rates in results.items()
    ]
    facts = machine("zarr", "tensorstore", "pyarrow", "google-crc32c")
    title = f"Rows of {ROW_TOKENS} uint16 tokens, page cache warm, checksums verified by all but memmap and Parquet"
    header = ("order", "reader", "rows/s", "GB/s", "row reader is x times")
    record = {"machine": facts, "random": random, "sequential": sequential, "missing": missing, "rows": options.rows}
    publish(options.out, title, header, table, record)
    print("".join(f"not measured, not installed: {name}\n" for name in missing), end="")


def zipf_rows(count: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Tokens whose frequencies fall like those of words."""
    weights = 1 / np.arange(1, VOCABULARY + 1)
    draws = np.random.default_rng(0).random((count, ROW_TOKENS), dtype=np.float32)
    return np.searchsorted(np.cumsum(weights / weights.sum())[:-1], draws).astype(np.uint16)


def write_dataset(directory: Path, rows: np.ndarray[Any, np.dtype[np.uint16]], parts: int) -> Manifest:
    directory.mkdir()
    written = [write_part(directory, part_name(i), piece) for i, piece in enumerate(np.array_split(rows, parts))]
    return Manifest(
        sequence_length=ROW_TOKENS - 1,
        dtype="uint16",
        tokenizer_sha256="0" * 64,
        vocab_size=VOCABULARY,
        special_ids={},
        documents=1,
        dropped_tokens=0,
        text_bytes=1,
        unigram_entropy=1.0,
        parts=tuple(written),
    )


def random_batches(rows: int, count: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    return np.array_split(np.random.default_rng().permutation(rows)[:count], max(1, count // BATCH))


def runs(rows: int, length: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    return np.array_split(np.arange(rows), rows // length)


def as_batch(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return rows.astype(np.int64)


def timed(batches: list[np.ndarray[Any, Any]], read: Callable[[np.ndarray[Any, Any]], object]) -> float:
    """Return rows a second."""
    started = time.perf_counter()
    for batch in batches:
        read(batch)
    return sum(map(len, batches)) / (time.perf_counter() - started)


def add_tensorstore(random: Cases, sequential: Cases, part: Path, rows: int) -> list[str]:
    try:
        import tensorstore
    except ImportError:
        return ["tensorstore"]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(part)}}
    store = tensorstore.open(spec, read=True).result()
    random["tensorstore"] = lambda: timed(
        random_batches(rows, 4096), lambda w: as_batch(np.asarray(store[w].read().result()))
    )
    sequential["tensorstore"] = lambda: timed(
        runs(rows, 256), lambda w: np.asarray(store[int(w[0]) : int(w[-1]) + 1].read().result())
    )
    return []


def add_parquet(random: Cases, path: Path, rows: np.ndarray[Any, Any]) -> list[str]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        return ["pyarrow"]
    few = rows[:4000].astype(np.int32)
    lists = pa.ListArray.from_arrays(np.arange(len(few) + 1) * ROW_TOKENS, pa.array(few.ravel()))
    parquet.write_table(pa.table({"input_ids": lists}), path, row_group_size=1000)

    file = parquet.ParquetFile(path)

    def read(wanted: np.ndarray[Any, Any]) -> object:
        for row in wanted:
            group = file.read_row_group(int(row) // 1000).to_pylist()
            yield np.array(group[int(row) % 1000]["input_ids"], dtype=np.int64)

    random["Parquet row groups (reference)"] = lambda: timed(
        [np.random.default_rng().integers(0, len(few), 2)],
        lambda w: list(read(w)),  # type: ignore[call-overload]
    )
    return []


if __name__ == "__main__":
    main()
