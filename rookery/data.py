"""`rookery data`: train a tokenizer, build a dataset, look into one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import ExitCode

if TYPE_CHECKING:
    from data_prep.manifest import Manifest

app = typer.Typer(help="Corpora, tokenizers and datasets.", no_args_is_help=True)

Inputs = Annotated[
    list[Path],
    typer.Option("--input", metavar="PATH...", help="File, directory of text files, or .list file; may be repeated."),
]
MoreInputs = Annotated[list[Path] | None, typer.Argument(metavar="PATH", help="More inputs, as after --input.")]
Dataset = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a dataset.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

SECONDS_BETWEEN_LINES = 10.0


@app.command("train-tokenizer")
def train_tokenizer(
    inputs: Inputs,
    vocab_size: Annotated[int, typer.Option(help="Tokens, the 256 bytes and the special tokens included.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    more: MoreInputs = None,
) -> None:
    """Train a byte-level BPE and save it as a Hugging Face tokenizer.json."""
    from data_prep.corpus import find_documents, read_document
    from data_prep.files import refuse_existing
    from data_prep.tokenizer import save_tokenizer
    from data_prep.tokenizer import train_tokenizer as train
    from data_prep.world import World

    started = time.perf_counter()
    world = World.discover()
    with world.guard("train tokenizer"):
        if world.rank == 0:
            refuse_existing(out)
            paths = find_documents([*inputs, *(more or [])])
            with _progress("reading documents", shown=True) as advance:

                def texts() -> Iterator[str]:
                    for number, path in enumerate(paths, start=1):
                        yield read_document(path)
                        advance(number, len(paths))

                model = train(texts(), vocab_size)
            save_tokenizer(model, out)
            seconds = time.perf_counter() - started
            print(f"{out}: {vocab_size} tokens from {len(paths)} documents in {seconds:.1f} s")


@app.command()
def build(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option(metavar="DIR", help="Directory of a tokenizer.json.")],
    sequence_length: Annotated[int, typer.Option(help="Tokens a row trains on; a row stores one more.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    more: MoreInputs = None,
) -> None:
    """Tokenize documents into a dataset of equal rows; under mpiexec or srun, on all ranks."""
    from data_prep.build import BuildReport, build_dataset
    from data_prep.world import World

    started = time.perf_counter()
    world = World.discover()
    documents = [*inputs, *(more or [])]
    with _progress("tokenizing (share of rank 0)", shown=world.rank == 0) as advance:

        def report(state: BuildReport) -> None:
            advance(state.bytes_done, state.bytes_total)

        manifest = build_dataset(documents, tokenizer, sequence_length, out, world, progress=report)
    if world.rank == 0:
        seconds = time.perf_counter() - started
        rate = manifest.text_bytes / 1e6 / seconds
        print(f"{out}: {_summary(manifest)}; {seconds:.1f} s on {world.size} rank(s), {rate:.1f} MB/s of text")


@app.command()
def info(directory: Dataset, as_json: AsJson = False) -> None:
    """Say what a dataset holds, from its manifest."""
    from data_prep.manifest import Manifest

    manifest = Manifest.load(directory)
    if as_json:
        print(json.dumps({**manifest.as_record(), "shards": len(manifest.parts)}))
        return
    print(f"{directory}: {_summary(manifest)}")
    print(f"fingerprint {manifest.fingerprint}")
    print(f"tokenizer {manifest.tokenizer_sha256} of {manifest.vocab_size} tokens")
    print(f"unigram entropy {manifest.unigram_entropy:.4f} nats a token")


@app.command()
def verify(directory: Dataset, as_json: AsJson = False) -> None:
    """Check every byte of a dataset against its manifest; exit 12 and name what is broken."""
    from data_prep.verify import verify_dataset

    problems = verify_dataset(directory)
    if as_json:
        print(json.dumps({"ok": not problems, "problems": problems}))
    else:
        print("\n".join(problems) or f"{directory}: whole")
    if problems:
        raise typer.Exit(ExitCode.BAD_INPUT)


@app.command()
def show(
    directory: Dataset,
    row: Annotated[int, typer.Argument(metavar="ROW", help="Index of a row.")],
    tokenizer: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the dataset's tokenizer.json.")],
) -> None:
    """Print one row of a dataset as text, control tokens by their names."""
    from data_prep.errors import DataError
    from data_prep.manifest import Manifest
    from data_prep.shards import RowReader
    from data_prep.tokenizer import Tokenizer

    manifest = Manifest.load(directory)
    encoder = Tokenizer.load(tokenizer)
    if encoder.sha256 != manifest.tokenizer_sha256:
        raise DataError(
            f"--tokenizer {tokenizer}: {directory} was built with another tokenizer (sha256"
            f" {manifest.tokenizer_sha256}); name that one"
        )
    if not 0 <= row < manifest.rows:
        raise DataError(f"ROW {row}: {directory} has rows 0 to {manifest.rows - 1}")
    print(encoder.decode(RowReader(directory, manifest).row(row)))


def _summary(manifest: Manifest) -> str:
    return (
        f"{manifest.documents} documents, {manifest.tokens} tokens in {manifest.rows} rows of {manifest.row_tokens}"
        f" ({manifest.dropped_tokens} dropped), {len(manifest.parts)} shards"
    )


@contextmanager
def _progress(title: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, total): a bar on a terminal, a line every ten seconds elsewhere, or nothing."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not shown:
        yield lambda done, total: None
    elif console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _line_printer(title)


def _line_printer(title: str) -> Callable[[int, int], None]:
    next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def advance(done: int, total: int) -> None:
        nonlocal next_line
        if time.monotonic() >= next_line:
            next_line += SECONDS_BETWEEN_LINES
            print(f"{title}: {100 * done / max(total, 1):.0f} %", file=sys.stderr, flush=True)

    return advance
