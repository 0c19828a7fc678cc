"""Text to rows on disk: `rookery data build`, against the reference's way and datatrove, with one tokenizer.

- rookery: `build_dataset` in a process of its own, with the encoder that it chooses, and with `tokenizers`.
- encoding alone: the same reader and encoder over the same files (`rookery data count`), nothing packed or written.
- reference: Hugging Face `tokenizers` called per batch of 1,024 documents, Parquet of int32 lists (steps I, III).
- datatrove: JsonlReader and DocumentTokenizer, one task; left out and said so if it is not installed.
The text is real: the Python and text files of this machine's interpreter (--megabytes of them), as JSON lines.
    pip install --target PEERS datatrove[processing] pyarrow
    python -m benchmarks.data_build --peers PEERS
What a second rank brings, and what writing adds, is in `data_ranks`: here the start of the processes blurs it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import arguments, in_turn, machine, median, publish, ratio
from data_prep.build import build_dataset
from data_prep.config import BuildConfig
from data_prep.count import count_tokens
from data_prep.engine import choose_engine
from data_prep.readers import ReaderOptions, plan_items
from data_prep.sampling import Source
from data_prep.tokenizer import Tokenizer, save_tokenizer, train_tokenizer
from data_prep.world import World

SEQUENCE_LENGTH = 4096
BATCH = 1024


def main() -> None:
    options = arguments(__doc__ or "", megabytes=40, rounds=3, vocabulary=32_768)
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_corpus(folder, options.megabytes * 10**6)
        save_tokenizer(train_tokenizer(texts(folder, 4000), options.vocabulary), folder / "tokenizer")
        engine = choose_engine(folder / "tokenizer", list(texts(folder, 200)))
        cases = {
            f"rookery, {engine.name}": lambda: own_process(build, folder, "auto"),
            f"{engine.name} alone": lambda: own_process(encode, folder, "auto"),
            "rookery, tokenizers": lambda: own_process(build, folder, "tokenizers"),
            "tokenizers per batch, Parquet (reference)": lambda: own_process(reference, folder, ""),
        }
        missing = [] if installed("datatrove") else ["datatrove"]
        if not missing:
            cases["datatrove"] = lambda: own_process(datatrove, folder, "")
        tokens = {count(folder, "auto"), count(folder, "tokenizers")}
        assert len(tokens) == 1, f"the encoders disagree: {tokens}"
        seconds = in_turn(cases, options.rounds)
    report(options, seconds, size, missing)


def report(options: Any, seconds: dict[str, list[float]], size: int, missing: list[str]) -> None:
    ours = next(iter(seconds.values()))
    table = [
        (name, f"{median(taken):.2f}", f"{size / 1e6 / median(taken):.1f}", f"{ratio(taken, ours):.2f}")
        for name, taken in seconds.items()
    ]
    title = f"{size / 1e6:.0f} MB of text to rows of {SEQUENCE_LENGTH + 1} tokens, start of the process included"
    header = ("way", "s", "MB/s", "times rookery's time")
    facts = machine("tokenizers", "gigatoken", "fastokens", "pyarrow", "datatrove")
    publish(
        options.out, title, header, table, {"machine": facts, "seconds": seconds, "bytes": size, "missing": missing}
    )
    print("".join(f"not measured, not installed: {name}\n" for name in missing), end="")


def write_corpus(folder: Path, limit: int) -> int:
    """Write eight files of JSON lines; return the bytes of text."""
    (folder / "corpus").mkdir()
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    paths = sorted(
        {p for root in roots for kind in ("*.py", "*.rst", "*.txt", "*.md", "*.pyi") for p in root.rglob(kind)}
    )
    size, files = 0, [(folder / "corpus" / f"{number}.jsonl").open("w") for number in range(8)]
    for number, path in enumerate(paths):
        if size >= limit:
            break
        text = path.read_text(encoding="utf-8", errors="replace")
        size += len(text.encode())
        files[number % 8].write(json.dumps({"text": text}) + "\n")
    for file in files:
        file.close()
    return size


def texts(folder: Path, limit: int | None = None) -> Iterator[str]:
    number = 0
    for path in sorted((folder / "corpus").iterdir()):
        with path.open() as lines:
            for line in lines:
                if limit is not None and number >= limit:
                    return
                number += 1
                yield json.loads(line)["text"]


def batches(folder: Path) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts(folder):
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    yield batch


def own_process(work: Any, folder: Path, engine: str) -> float:
    """Run `work` in a fresh interpreter; return the seconds from its start to its end."""
    started = time.perf_counter()
    process = multiprocessing.get_context("spawn").Process(target=work, args=(folder, engine))
    process.start()
    process.join()
    assert process.exitcode == 0, work.__name__
    return time.perf_counter() - started


def build(folder: Path, engine: str) -> None:
    shutil.rmtree(folder / "out", ignore_errors=True)
    config = BuildConfig(engine=engine)
    build_dataset(
        [folder / "corpus"], folder / "tokenizer", SEQUENCE_LENGTH, folder / "out", World.discover(), config=config
    )


def encode(folder: Path, engine: str) -> None:
    count(folder, engine)


def count(folder: Path, engine: str) -> int:
    options = ReaderOptions()
    source = Source("corpus", plan_items([folder / "corpus"], options))
    (counted,) = count_tokens([source], folder / "tokenizer", options, World(), engine=engine)
    return counted.tokens


def reference(folder: Path, engine: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    tokenizer = Tokenizer.load(folder / "tokenizer")
    row_tokens, left = SEQUENCE_LENGTH + 1, np.empty(0, np.int32)
    schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
    with parquet.ParquetWriter(folder / "reference.parquet", schema) as writer:
        for batch in batches(folder):
            stream = [left]
            for ids in tokenizer.encode_batch(batch):
                stream += [np.array([tokenizer.begin_id]), ids.astype(np.int32), np.array([tokenizer.end_id])]
            flat = np.concatenate(stream).astype(np.int32)
            rows = len(flat) // row_tokens
            left = flat[rows * row_tokens :]
            offsets = np.arange(rows + 1, dtype=np.int32) * row_tokens
            lists = pa.ListArray.from_arrays(offsets, pa.array(flat[: rows * row_tokens]))
            writer.write_table(pa.table([lists], schema=schema), row_group_size=1000)


def installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def datatrove(folder: Path, engine: str) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    shutil.rmtree(folder / "datatrove", ignore_errors=True)
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(folder / "corpus")),
            DocumentTokenizer(
                output_folder=str(folder / "datatrove/tokens"),
                tokenizer_name_or_path=str(folder / "tokenizer/tokenizer.json"),
                eos_token="<|end_text|>",
                shuffle_documents=False,
            ),
        ],
        tasks=1,
        logging_dir=str(folder / "datatrove/logs"),
    ).run()


if __name__ == "__main__":
    main()
