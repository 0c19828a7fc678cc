"""`rookery data`: train a tokenizer, count tokens, build a dataset, look into one, mend one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import ExitCode

if TYPE_CHECKING:
    from data_prep.build import BuildReport
    from data_prep.config import Build
    from data_prep.manifest import Manifest
    from data_prep.readers import ReaderOptions
    from data_prep.sampling import Source

app = typer.Typer(help="Corpora, tokenizers and datasets.", no_args_is_help=True)

INPUT_HELP = "File, directory, pattern in quotes, or .list file of these; may be repeated."
SOURCES_HELP = "YAML file of sources, each `name: {input: [PATH...], weight: 1.0}`."
Inputs = Annotated[list[Path] | None, typer.Option("--input", metavar="PATH...", help=INPUT_HELP)]
MoreInputs = Annotated[list[Path] | None, typer.Argument(metavar="PATH", help="More inputs, as after --input.")]
Sources = Annotated[Path | None, typer.Option(metavar="FILE", help=SOURCES_HELP)]
TextColumn = Annotated[str | None, typer.Option(help="Field or column of the text.  [default: text]")]
ChatColumn = Annotated[str | None, typer.Option(help="Field or column of chat turns.  [default: messages]")]
OnBad = Annotated[
    str | None, typer.Option("--on-bad-document", metavar="fail|skip", help="End, or count and skip.  [default: fail]")
]
Dataset = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a dataset.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

SECONDS_BETWEEN_LINES = 10.0


@app.command("train-tokenizer")
def train_tokenizer(  # noqa: PLR0913 - a parameter a flag
    vocab_size: Annotated[int, typer.Option(help="Tokens, the 256 bytes and the special tokens included.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    inputs: Inputs = None,
    more: MoreInputs = None,
    sources: Sources = None,
    sample: Annotated[
        int | None, typer.Option(metavar="CHARACTERS", help="Train on a sample of this size, by weight.")
    ] = None,
    text_column: TextColumn = None,
    chat_column: ChatColumn = None,
    on_bad: OnBad = None,
) -> None:
    """Train a byte-level BPE and save it as a Hugging Face tokenizer.json."""
    from data_prep.files import refuse_existing
    from data_prep.readers import read_item
    from data_prep.sampling import CorpusSample, plain_text
    from data_prep.tokenizer import save_tokenizer
    from data_prep.tokenizer import train_tokenizer as train
    from data_prep.world import World

    started = time.perf_counter()
    world = World.discover()
    with world.guard("train tokenizer"):
        if world.rank == 0:
            refuse_existing(out)
            options = _reader_options(text_column, chat_column, on_bad)
            named = _sources([*(inputs or []), *(more or [])], sources, options)
            skipped: list[Exception] = []
            on_problem = _skipper(options, skipped)
            items = [item for source in named for item in source.items]
            total = sum(item.bytes for item in items)

            def texts(advance: Callable[[int, int], None]) -> Iterator[str]:
                if sample is not None:
                    read = 0
                    for text in CorpusSample(named, sample, options, on_bad=on_problem):
                        read += len(text)
                        advance(read, sample)
                        yield text
                    return
                done = 0
                for item in items:
                    yield from map(plain_text, read_item(item, options, on_problem))
                    done += item.bytes
                    advance(done, total)

            with _progress("reading documents", shown=True) as advance:
                model = train(texts(advance), vocab_size)
            save_tokenizer(model, out)
            seconds = time.perf_counter() - started
            files = len({item.path for item in items})
            print(f"{out}: {vocab_size} tokens from {files} files in {seconds:.1f} s{_skips(len(skipped))}")


@app.command("adopt-tokenizer")
def adopt_tokenizer(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a Hugging Face tokenizer.json.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    begin: Annotated[str | None, typer.Option(help="Token that begins a document.  [default: its bos_token]")] = None,
    end: Annotated[str | None, typer.Option(help="Token that ends a document.  [default: its eos_token]")] = None,
    pad: Annotated[str | None, typer.Option(help="Token that fills rows.  [default: its pad_token]")] = None,
) -> None:
    """Take a tokenizer from elsewhere and add the control tokens that it lacks; all of its ids stay."""
    from dataclasses import replace

    from data_prep.tokenizer import adopt_tokenizer as adopt
    from data_prep.tokenizer import configured_tokens

    names = {role: name for role, name in (("begin", begin), ("end", end), ("pad", pad)) if name is not None}
    tokenizer = adopt(source, replace(configured_tokens(source), **names), out)
    control = ", ".join(f"{name} = {token_id}" for name, token_id in tokenizer.special_ids.items())
    print(f"{out}: {tokenizer.vocab_size} tokens; {control}")


@app.command()
def count(
    tokenizer: Annotated[Path, typer.Option(metavar="DIR", help="Directory of a tokenizer.json.")],
    inputs: Inputs = None,
    more: MoreInputs = None,
    sources: Sources = None,
    text_column: TextColumn = None,
    chat_column: ChatColumn = None,
    on_bad: OnBad = None,
    as_json: AsJson = False,
) -> None:
    """Count the tokens of each source (each input, or those of --sources); under mpiexec or srun, on all ranks."""
    from data_prep.count import count_tokens
    from data_prep.world import World

    world = World.discover()
    named: list[Source] = []
    with world.guard("find sources"):
        options = _reader_options(text_column, chat_column, on_bad)
        if world.rank == 0:
            named = _sources([*(inputs or []), *(more or [])], sources, options)
    named = world.broadcast(named)
    with _progress("counting (share of rank 0)", shown=world.rank == 0) as advance:
        counts = count_tokens(named, tokenizer, options, world, progress=advance)
    if world.rank:
        return
    if as_json:
        total = sum(each.tokens for each in counts)
        print(json.dumps({"tokens": total, "sources": [vars(each) for each in counts]}))
        return
    for each in counts:
        print(f"{each.name}: {each.documents} documents, {each.tokens} tokens{_skips(each.skipped)}")


@app.command()
def build(  # noqa: PLR0913 - a parameter a flag
    inputs: Inputs = None,
    more: MoreInputs = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="Directory of a tokenizer.json.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a row trains on; a row stores one more.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to make.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file that says all this, and more.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the file; may be repeated.")
    ] = None,
    text_column: TextColumn = None,
    chat_column: ChatColumn = None,
    on_bad: OnBad = None,
    packing: Annotated[str | None, typer.Option(help="concatenate or best-fit.  [default: concatenate]")] = None,
    task: Annotated[
        str | None, typer.Option(metavar="I/N", help="Do the share of task I of an array of N, without MPI.")
    ] = None,
    array: Annotated[int | None, typer.Option(metavar="N", help="Submit N such tasks through Submitit.")] = None,
    site: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Profile by which the array runs (`rookery sites`); `local` waits for it."),
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Option of sbatch, as time=2h; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenize documents into a dataset of equal rows; under mpiexec or srun, on all ranks.

    A build that was interrupted goes on when the same command is started again, on any number of ranks.
    """
    from data_prep.build import build_dataset, build_share
    from data_prep.config import parse_build, read_build_file
    from data_prep.errors import DataError
    from data_prep.manifest import Manifest
    from data_prep.world import World

    started = time.perf_counter()
    flags = {
        "input": [str(path) for path in (*(inputs or []), *(more or []))] or None,
        "tokenizer": tokenizer and str(tokenizer),
        "sequence_length": sequence_length,
        "out": out and str(out),
        "packing": packing,
        "readers.text_column": text_column,
        "readers.chat_column": chat_column,
        "readers.on_bad_document": on_bad,
    }
    world = World() if task is not None else World.discover()
    given = {**dict(_key_and_value(setting) for setting in settings or []), **flags}
    with world.guard("check arguments"):
        what = parse_build(read_build_file(config), {key: value for key, value in given.items() if value is not None})
        share = None if task is None else _task(task)
        if array is not None and (world.size > 1 or share is not None):
            raise DataError(f"--array {array}: submits tasks; leave out --task, mpiexec and srun")
        if array is None and (sbatch or site is not None):
            raise DataError("--sbatch, --site: are of use with --array alone")
    if array is not None:
        job, waited = _submit(what, array, site, dict(_key_and_text(option, "--sbatch") for option in sbatch or []))
        if waited:
            _print_built(Manifest.load(what.out), what.out, time.perf_counter() - started, array, as_json=as_json)
        elif as_json:
            print(json.dumps({"job": job, "tasks": array}))
        return
    with _progress("tokenizing", shown=world.rank == 0) as advance:

        def report(state: BuildReport) -> None:
            advance(state.bytes_done, state.bytes_total)

        arguments = (what.inputs, what.tokenizer, what.sequence_length, what.out)
        manifest = (
            build_dataset(*arguments, world, config=what.config, progress=report)
            if share is None
            else build_share(*arguments, share, config=what.config, progress=report)
        )
    if world.rank == 0 and manifest is None:
        print(f"{what.out}: this task has nothing left to do; other tasks are at work, or have to be started again")
    elif world.rank == 0 and manifest is not None:
        seconds = time.perf_counter() - started
        _print_built(manifest, what.out, seconds, world.size, as_json=as_json)


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
    print(f"packing {manifest.packing}: {manifest.padding_tokens} tokens of padding")
    for name, number in manifest.counters.items():
        print(f"{name} {number}")
    print(f"unigram entropy {manifest.unigram_entropy:.4f} nats a token")


@app.command()
def verify(directory: Dataset, as_json: AsJson = False) -> None:
    """Check every byte of a dataset against its manifest, on all ranks; exit 12 and name what is broken."""
    from data_prep.verify import verify_dataset
    from data_prep.world import World

    world = World.discover()
    problems = verify_dataset(directory, world)
    if world.rank == 0:
        if as_json:
            print(json.dumps({"ok": not problems, "problems": problems}))
        else:
            print("\n".join(problems) or f"{directory}: whole")
    if problems:
        raise typer.Exit(ExitCode.BAD_INPUT)


@app.command()
def repair(directory: Dataset, as_json: AsJson = False) -> None:
    """Rebuild the broken parts of a dataset from its inputs, and nothing else; under mpiexec or srun, on all ranks."""
    from data_prep.repair import repair_dataset
    from data_prep.world import World

    world = World.discover()
    with _progress("repairing", shown=world.rank == 0) as advance:
        repaired = repair_dataset(directory, world, advance)
    if world.rank == 0:
        if as_json:
            print(json.dumps({"repaired": repaired}))
        else:
            print(f"{directory}: repaired {', '.join(repaired)}" if repaired else f"{directory}: whole")


def _print_built(manifest: Manifest, out: Path, seconds: float, ranks: int, *, as_json: bool) -> None:
    rate = manifest.text_bytes / 1e6 / seconds
    if as_json:
        print(json.dumps({**manifest.as_record(), "seconds": seconds, "ranks": ranks, "megabytes_per_second": rate}))
        return
    print(f"{out}: {_summary(manifest)}; {seconds:.1f} s on {ranks} rank(s) or task(s), {rate:.1f} MB/s of text")
    skipped = manifest.counters.get("skipped", 0)
    if skipped:
        print(f"{skipped} bad documents were left out; {out / 'skipped.txt'} says why", file=sys.stderr)


def _summary(manifest: Manifest) -> str:
    return (
        f"{manifest.documents} documents, {manifest.tokens} tokens in {manifest.rows} rows of {manifest.row_tokens}"
        f" ({manifest.dropped_tokens} dropped), {len(manifest.parts)} shards"
    )


def _skips(skipped: int) -> str:
    return f", {skipped} bad documents skipped" if skipped else ""


def _submit(what: Build, tasks: int, site_name: str | None, sbatch: dict[str, str]) -> tuple[str, bool]:
    """Submit a build as an array of tasks; return the job's id, and whether all ended, as they do on this machine."""
    from data_prep.errors import DataError
    from data_prep.files import refuse_existing, write_atomic
    from slurm.array import submit_array, wait_for
    from slurm.site import load_site

    site = None if site_name is None else load_site(site_name)
    if tasks < 1:
        raise DataError(f"--array {tasks}: needs at least one task")
    if what.config.filters.deduplicate != "none":
        raise DataError(
            f"--array {tasks}: filters.deduplicate needs ranks that talk to each other; use mpiexec or srun instead"
        )
    refuse_existing(what.out)
    folder = what.out.with_name(f"{what.out.name}.jobs").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "build.yaml"
    write_atomic(file, what.as_yaml().encode())
    command = [sys.executable, "-m", "rookery", "data", "build", "--config", str(file), "--task"]
    commands = [[*command, f"{number}/{tasks}"] for number in range(1, tasks + 1)]
    jobs = submit_array(commands, folder, f"build-{what.out.name}", site, sbatch)
    job: str = jobs[0].job_id.split("_")[0]
    print(f"{what.out}: {tasks} tasks submitted, job {job}; logs in {folder}", file=sys.stderr)
    local = site is not None and site.scheduler == "local"
    if local:
        wait_for(jobs)
    return job, local


def _key_and_text(setting: str, flag: str) -> tuple[str, str]:
    from data_prep.errors import DataError

    key, equals, value = setting.partition("=")
    if not equals or not key:
        raise DataError(f"{flag} {setting}: write it as KEY=VALUE")
    return key, value


def _key_and_value(setting: str) -> tuple[str, Any]:
    import yaml

    from data_prep.errors import DataError

    key, value = _key_and_text(setting, "--set")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise DataError(f"--set {setting}: {value!r} is no YAML value; quote it") from error


def _task(task: str) -> tuple[int, int]:
    from data_prep.errors import DataError

    number, _, tasks = task.partition("/")
    if not (number.isdecimal() and tasks.isdecimal()):
        raise DataError(f"--task {task}: write it as I/N, such as 3/16")
    return int(number), int(tasks)


def _reader_options(text_column: str | None, chat_column: str | None, on_bad: str | None) -> ReaderOptions:
    from data_prep.config import from_mapping
    from data_prep.readers import ReaderOptions

    given = {"text_column": text_column, "chat_column": chat_column, "on_bad_document": on_bad}
    return from_mapping(ReaderOptions, {key: value for key, value in given.items() if value is not None}, "readers")


def _skipper(options: ReaderOptions, skipped: list[Exception]) -> Callable[[Any], None]:
    from data_prep.readers.items import fail

    return skipped.append if options.on_bad_document == "skip" else fail


def _sources(inputs: list[Path], file: Path | None, options: ReaderOptions) -> list[Source]:
    """Return each input as a source of its own, or the sources of the file."""
    from data_prep.config import read_sources
    from data_prep.errors import DataError
    from data_prep.readers import plan_items
    from data_prep.sampling import Source

    if bool(inputs) == (file is not None):
        raise DataError("--input or --sources: name the corpus with one of the two")
    if file is None:
        return [Source(str(path), plan_items([path], options)) for path in inputs]
    return [Source(name, plan_items(paths, options), weight) for name, paths, weight in read_sources(file)]


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
    started = time.monotonic()
    next_line = started + SECONDS_BETWEEN_LINES
    first: int | None = None  # what an earlier build had done

    def advance(done: int, total: int) -> None:
        nonlocal next_line, first
        first = done if first is None else first
        now = time.monotonic()
        if now < next_line:
            return
        next_line += SECONDS_BETWEEN_LINES
        left = (total - done) * (now - started) / (done - first) if done > first else None
        eta = "" if left is None else f", {left / 60:.0f} min left" if left > 120 else f", {left:.0f} s left"
        print(f"{title}: {100 * done / max(total, 1):.0f} %{eta}", file=sys.stderr, flush=True)

    return advance
