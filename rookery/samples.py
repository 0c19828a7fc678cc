"""`rookery data order` and `rookery data show`: which samples a step takes, and what they say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.loader import TrainingData

WHERE_HELP = "A run directory, a configuration (path or shipped name), or a dataset directory."
Where = Annotated[str, typer.Argument(metavar="RUN|CONFIG|DIR", help=WHERE_HELP)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of a configuration.")]
Rank = Annotated[int, typer.Option(help="The rank.")]
WorldSize = Annotated[int, typer.Option("--world", help="Number of ranks.")]
Seed = Annotated[int | None, typer.Option(help="For a dataset directory: the run's seed.  [default: 233]")]
GlobalBatch = Annotated[
    int | None, typer.Option(help="For a dataset directory: sequences of a step.  [default: one a rank]")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def order(
    where: Where,
    step: Annotated[int, typer.Option(help="The optimizer step, 0 for the first.")],
    overrides: Overrides = None,
    rank: Rank = 0,
    world: WorldSize = 1,
    seed: Seed = None,
    global_batch_size: GlobalBatch = None,
    as_json: AsJson = False,
) -> None:
    """Print the samples of one rank in one step: dataset, epoch and row of each."""
    run = _open(where, overrides or [], world, seed, global_batch_size)
    samples = run.samples(step, rank, world)
    if as_json:
        print(json.dumps({"step": step, "rank": rank, "world": world, **run.facts(), "samples": samples}))
        return
    print(f"step {step}, rank {rank} of {world}: global batch of {run.global_batch_size}, seed {run.seed}")
    for sample in samples:
        print(f"sample {sample['sample']}: {sample['dataset']} epoch {sample['epoch']} row {sample['row']}")


def show(  # noqa: PLR0913 - options of a command
    where: Where,
    what: Annotated[
        list[str] | None, typer.Argument(metavar="[ROW] [KEY=VALUE]...", help="A row of a dataset directory.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="An optimizer step, 0 for the first.")] = None,
    rank: Rank = 0,
    world: WorldSize = 1,
    seed: Seed = None,
    global_batch_size: GlobalBatch = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A dataset's tokenizer.  [default: its own]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a row of a dataset, or the samples of one rank in one step, as text; control tokens by their names."""
    from data_prep.errors import DataError

    words = list(what or [])
    row = int(words.pop(0)) if words and words[0].isdecimal() else None
    if (row is None) == (step is None):
        raise DataError(f"rookery data show {where}: give either the index of a row, or --step")
    run = _open(where, words, world, seed, global_batch_size, tokenizer)
    samples = run.samples(step, rank, world) if step is not None else run.row(row or 0)
    texts = run.texts(samples)
    if as_json:
        shown = [{**sample, "text": text} for sample, text in zip(samples, texts, strict=True)]
        print(json.dumps({"samples": shown}))
    elif row is not None:
        print(texts[0])
    else:
        for sample, text in zip(samples, texts, strict=True):
            print(f"--- sample {sample['sample']}: {sample['dataset']} epoch {sample['epoch']} row {sample['row']}")
            print(text)


@dataclass(frozen=True)
class _Order:
    """The order of a run, or of a training on one dataset alone."""

    data: TrainingData
    seed: int
    global_batch_size: int
    tokenizer: Path | None
    config: RunConfig | None = None

    def facts(self) -> dict[str, Any]:
        return {"seed": self.seed, "global_batch_size": self.global_batch_size}

    def samples(self, step: int, rank: int, world: int) -> list[dict[str, Any]]:
        from data_prep.errors import DataError
        from pipeline.agenda import Agenda
        from pipeline.loader import Share, contiguous
        from pipeline.schedules import batch_size, samples_before

        if world < 1 or not 0 <= rank < world or step < 0:
            raise DataError(f"--step {step} --rank {rank} --world {world}: need a step >= 0 and a rank below --world")
        if (step + 1) * self.global_batch_size >= 2**63:
            raise DataError(f"--step {step}: beyond any run; the number of samples needs more than 63 bits")
        config, final, length = self.config, self.global_batch_size, self.data.mixture.length
        size = final if config is None else batch_size(config.schedule, final, step)
        consumed = step * final if config is None else samples_before(config.schedule, final, step)
        if size % world:
            raise DataError(f"--world {world}: {world} ranks do not divide the global batch of {size}")
        if length is not None and consumed + size > length:
            raise DataError(f"--step {step}: the datasets' max_epochs end after {length} samples")
        if config is not None and config.depth.scope == "balanced":
            config.train.check_world_size(world, config.schedule)
            share = Agenda(config, rank, world).at(step, consumed).share
            numbers = share.samples(config.train.micro_batch_size)
        else:
            numbers = Share(consumed, size, contiguous(rank, world, size)).samples(1)
        located = self.data.mixture.locate(numbers)
        return [
            self._record(source, row, sample=sample, epoch=ordinal // self.data.manifests[source].rows)
            for sample, source, ordinal, row in zip(numbers.tolist(), *(part.tolist() for part in located), strict=True)
        ]

    def row(self, row: int) -> list[dict[str, Any]]:
        from data_prep.errors import DataError

        if len(self.data.manifests) > 1:
            raise DataError(f"ROW {row}: of which dataset? give the directory of one, or --step")
        if row >= self.data.manifests[0].rows:
            last = self.data.manifests[0].rows - 1
            raise DataError(f"ROW {row}: {self.data.directories[0]} has rows 0 to {last}")
        return [self._record(0, row)]

    def texts(self, samples: list[dict[str, Any]]) -> list[str]:
        from data_prep.errors import DataError
        from data_prep.shards import RowReader
        from data_prep.tokenizer import Tokenizer

        if self.tokenizer is None:
            raise DataError("--tokenizer: name the directory of the dataset's tokenizer.json")
        encoder = Tokenizer.load(self.tokenizer)
        if encoder.sha256 != self.data.tokenizer_sha256:
            raise DataError(
                f"--tokenizer {self.tokenizer}: {self.data.directories[0]} was built with another tokenizer (sha256"
                f" {self.data.tokenizer_sha256}); name that one"
            )
        opened = zip(self.data.mixture.sources, self.data.directories, self.data.manifests, strict=True)
        readers = {source.name: RowReader(directory, manifest) for source, directory, manifest in opened}
        texts = [encoder.decode(readers[sample["dataset"]].row(sample["row"])) for sample in samples]
        for reader in readers.values():
            reader.close()
        return texts

    def _record(self, source: int, row: int, **more: int) -> dict[str, Any]:
        name, directory = self.data.mixture.sources[source].name, self.data.directories[source]
        return {**more, "dataset": name, "directory": str(directory), "row": row}


def _open(
    where: str,
    overrides: list[str],
    world: int,
    seed: int | None,
    global_batch_size: int | None,
    tokenizer: Path | None = None,
) -> _Order:
    from data_prep.errors import DataError
    from data_prep.job import TOKENIZER_DIRECTORY
    from data_prep.manifest import Manifest
    from pipeline.config import RunConfig, load_config
    from pipeline.loader import TrainingData, open_mixture
    from pipeline.mixture import Mixture, Source

    directory = Path(where)
    if directory.is_dir() and not (directory / "run.yaml").is_file():
        if overrides:
            raise DataError(f"{overrides[0]}: overrides are for a configuration; {where} is a dataset")
        if global_batch_size is not None and global_batch_size < 1:
            raise DataError(f"--global-batch-size {global_batch_size}: needs at least one sequence")
        manifest = Manifest.read(directory)
        if tokenizer is None and (directory / TOKENIZER_DIRECTORY).is_dir():
            tokenizer = directory / TOKENIZER_DIRECTORY
        chosen = RunConfig.seed if seed is None else seed
        mixture = Mixture([Source(directory.name, manifest.rows, fingerprint=manifest.fingerprint)], chosen)
        data = TrainingData((directory,), (manifest,), mixture)
        return _Order(data, chosen, global_batch_size or world, tokenizer)
    if seed is not None or global_batch_size is not None:
        raise DataError(f"--seed, --global-batch-size: {where} has its own; use overrides such as seed=7")
    config = load_config(str(directory / "run.yaml") if directory.is_dir() else where, overrides)
    directories = tuple(Path(source.path) for source in config.data.train.values())
    manifests = tuple(map(Manifest.read, directories))
    data = TrainingData(directories, manifests, open_mixture(config.data, config.seed, manifests))
    return _Order(data, config.seed, config.train.global_batch_size, tokenizer or Path(config.data.tokenizer), config)
