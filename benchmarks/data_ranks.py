"""What a second rank brings to a build, and what writing adds to encoding: cost of more text, without that of starting.

Each way runs on half of the corpus and on all of it, and what counts is the difference. Ranks are bound to a core each,
as srun binds them, but for "not bound": there the thread that writes has the other core.
    python -m benchmarks.data_ranks --megabytes 400
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.data_build import SEQUENCE_LENGTH, texts, write_corpus
from benchmarks.harness import arguments, in_turn, machine, median, publish
from data_prep.tokenizer import save_tokenizer, train_tokenizer
from slurm.local import rank_command

BUILD = ["build", "--sequence-length", str(SEQUENCE_LENGTH), "--out", "out"]
WAYS = {
    "1 rank": (1, True, BUILD),
    "2 ranks": (2, True, BUILD),
    "1 rank, reading and encoding alone": (1, True, ["count"]),
    "1 rank, not bound": (1, False, BUILD),
    "1 rank, not bound, best-fit": (1, False, [*BUILD, "--packing", "best-fit"]),
    "1 rank, not bound, reading and encoding alone": (1, False, ["count"]),
}


def main() -> None:
    options = arguments(__doc__ or "", megabytes=400, rounds=5, vocabulary=32_768)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_corpus(folder, options.megabytes * 10**6)
        save_tokenizer(train_tokenizer(texts(folder, 4000), options.vocabulary), folder / "tokenizer")
        (folder / "half").mkdir()
        for path in sorted((folder / "corpus").iterdir())[::2]:
            (folder / "half" / path.name).symlink_to(path)
        cases = {
            f"{way}|{corpus}": (lambda way=way, corpus=corpus: seconds(folder, corpus, *WAYS[way]))
            for way in WAYS
            for corpus in ("half", "corpus")
        }
        results = in_turn(cases, options.rounds)
    table = []
    for way in WAYS:
        half, whole = median(results[f"{way}|half"]), median(results[f"{way}|corpus"])
        table.append((way, f"{half:.2f}", f"{whole:.2f}", f"{whole - half:.2f}", f"{size / 2e6 / (whole - half):.0f}"))
    header = ("way", "half, s", "all, s", "difference, s", "MB/s")
    facts = machine("tokenizers", "gigatoken", "fastokens")
    title = f"{size / 1e6:.0f} MB of text to rows of {SEQUENCE_LENGTH + 1} tokens"
    publish(options.out, title, header, table, {"machine": facts, "seconds": results, "bytes": size})


def seconds(folder: Path, corpus: str, ranks: int, bound: bool, command: list[str]) -> float:
    shutil.rmtree(folder / "out", ignore_errors=True)
    words = [sys.executable, "-m", "rookery", "data", *command, "--input", corpus, "--tokenizer", "tokenizer"]
    launcher, *rest = rank_command(ranks, words)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    subprocess.run(
        [launcher, *(["-bind-to", "core"] if bound else []), *rest],
        check=True, cwd=folder, env=environment, capture_output=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
