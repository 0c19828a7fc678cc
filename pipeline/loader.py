"""From the samples consumed to this rank's next rows: the order knows no ranks, and there is no other state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from data_prep.errors import DataError
from data_prep.manifest import Manifest, part_problem
from data_prep.shards import RowReader
from data_prep.tokenizer import Tokenizer
from pipeline.errors import ConfigError
from pipeline.mixture import Change, Mixture, Source
from pipeline.schedules import samples_before

if TYPE_CHECKING:
    from pipeline.config import RunConfig

ONLY_DATASET = "all"
"""Name of the dataset that `data.train: PATH` gives."""

IGNORED = -100
"""Label of a position that is not trained on; what torch's cross-entropy leaves out."""


@dataclass(kw_only=True)
class SourceConfig:
    """One dataset of the training mixture."""

    path: str
    """Directory of the dataset (`rookery data build`)."""
    weight: float = 1.0
    """Its part of the samples, relative to the other datasets' weights; 0 for none until the schedule gives it one."""
    max_epochs: float | None = None
    """Times that its rows are served at most; then the other datasets share its part. No limit if null."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.max_epochs is not None and not (math.isfinite(self.max_epochs) and self.max_epochs > 0):
            raise ConfigError(f"data.train: max_epochs {self.max_epochs} of {self.path} is not positive")


@dataclass(kw_only=True)
class WeightChange:
    """New weights in the middle of the run."""

    sample: int
    """First sample of the run with these weights: a step times the global batch size."""
    weights: dict[str, float]
    """Weight by name of the dataset; those that are not named keep theirs."""


@dataclass(kw_only=True)
class DataConfig:
    """Where the tokens are, and in which proportion they are trained on."""

    train: dict[str, SourceConfig]
    """The training datasets by name, all of the same tokenizer and row length; or the directory of the only one."""
    schedule: list[WeightChange] = field(default_factory=list)
    """Changes of the weights, in the order of their samples."""
    validation: str
    """Directory of the validation dataset, of the same tokenizer."""
    tokenizer: str
    """Directory of the tokenizer; copied into the run, so that the run can be exported on its own."""
    prefetch: int = 2
    """Steps whose rows a background thread reads ahead of the training; each holds one rank's share of the batch."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if not self.train:
            raise ConfigError("data.train: no dataset; give a directory, or datasets by name with their paths")
        if self.prefetch < 0:
            raise ConfigError(f"data.prefetch: {self.prefetch} is negative")


class MicroBatch(NamedTuple):
    """Rows of one forward pass.

    Attributes:
        samples: (B,) int64 global sample indices.
        input_ids: (B, S) int64.
        labels: (B, S) int64, the following token of each position, `IGNORED` where that is padding or not trained on.
        documents: (B, S) int64, the number of each position's document within its row; a row may begin in one.
    """

    samples: torch.Tensor
    input_ids: torch.Tensor
    labels: torch.Tensor
    documents: torch.Tensor

    @property
    def trained_tokens(self) -> int:
        """Number of labels that count."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> MicroBatch:
        """Return the batch with what the model reads on `device`."""
        return MicroBatch(self.samples, *(tensor.to(device) for tensor in self[1:]))


class Share(NamedTuple):
    """What one rank takes of a global batch.

    Attributes:
        consumed: samples of the run before the batch.
        batch_size: sequences of the batch, over all ranks.
        micro_batches: numbers of the rank's micro-batches within the batch, in the order in which they are trained on.
    """

    consumed: int
    batch_size: int
    micro_batches: tuple[int, ...]

    def samples(self, micro_batch_size: int) -> npt.NDArray[np.int64]:
        """Return the global sample indices, in the order of the micro-batches."""
        numbers = np.array(self.micro_batches, dtype=np.int64)[:, None]
        return (numbers * micro_batch_size + np.arange(micro_batch_size)).ravel() + self.consumed


def contiguous(rank: int, world_size: int, micro_batches: int) -> tuple[int, ...]:
    """Return the numbers of a rank's micro-batches where `micro_batches` of a global batch are cut in equal slices."""
    share = micro_batches // world_size
    return tuple(range(rank * share, (rank + 1) * share))


def read_micro_batch(
    reader: RowReader, manifest: Manifest, samples: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> MicroBatch:
    """Read `rows` of a dataset, in their order, as the inputs and labels of the global `samples`."""
    return _micro_batch(manifest, samples, *_read(reader, manifest, rows))


@dataclass(frozen=True)
class TrainingData:
    """The training datasets and the order of their samples, once everything is known to fit.

    Attributes:
        directories, manifests: of each source, in the order of `mixture.sources`.
        mixture: the order.
    """

    directories: tuple[Path, ...]
    manifests: tuple[Manifest, ...]
    mixture: Mixture

    @property
    def tokenizer_sha256(self) -> str:
        """Digest of the tokenizer that all of them were built with."""
        return self.manifests[0].tokenizer_sha256

    def check_shards(self, rank: int, world_size: int) -> None:
        """See that this rank's part of all shards is there in full size; all ranks together look at each once.

        Raises:
            DataError: one is missing or of another size.
        """
        for directory, manifest in zip(self.directories, self.manifests, strict=True):
            for part in manifest.parts[rank::world_size]:
                problem = part_problem(directory, part)
                if problem is not None:
                    raise DataError(f"{problem}; restore it, or rebuild with `rookery data build`")

    @property
    def trains_on_all(self) -> bool:
        """Whether every token of every row is a target: nothing is padded, and there are no loss masks."""
        return all(
            manifest.padding_tokens == 0 and all(part.mask_bytes == 0 for part in manifest.parts)
            for manifest in self.manifests
        )


class Loader:
    """Serves shares of the global batch that follows any number of consumed samples.

    It knows no ranks and no steps: neither the samples of a batch nor their order depend on them. A thread reads the
    shares that come next while one is trained on; to seek is to ask for another share.
    """

    def __init__(self, data: TrainingData, micro_batch_size: int) -> None:
        self._data = data
        self._readers = [RowReader(*opened) for opened in zip(data.directories, data.manifests, strict=True)]
        self._micro_batch_size = micro_batch_size
        # One thread: it reads in order, and the readers are not made for several.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: dict[Share, Future[list[MicroBatch]]] = {}

    def micro_batches(self, share: Share, ahead: Sequence[Share] = ()) -> list[MicroBatch]:
        """Return the micro-batches of `share`, in its order, and begin to read those of `ahead`.

        Raises:
            DataError: a row that is needed now is missing or broken; one that was read ahead is not complained about.
        """
        wanted = [share, *(later for later in ahead if self._exists(later))]
        for request in self._ahead.keys() - set(wanted):  # after a seek
            self._ahead.pop(request).cancel()
        for request in wanted:
            if request not in self._ahead:
                self._ahead[request] = self._thread.submit(self._read, request)
        return self._ahead.pop(share).result()

    def close(self) -> None:
        """End the thread and close the shard files."""
        self._thread.shutdown(cancel_futures=True)
        self._ahead.clear()
        for reader in self._readers:
            reader.close()

    def _exists(self, share: Share) -> bool:
        length = self._data.mixture.length
        return length is None or share.consumed + share.batch_size <= length

    def _read(self, share: Share) -> list[MicroBatch]:
        size = self._micro_batch_size
        samples = share.samples(size)
        located, manifest = self._data.mixture.locate(samples), self._data.manifests[0]
        tokens = np.empty((samples.size, manifest.row_tokens), dtype=np.int64)
        trained = np.empty(tokens.shape, dtype=np.bool_)
        for source in np.unique(located.sources):
            here = located.sources == source
            tokens[here], trained[here] = _read(self._readers[source], self._data.manifests[source], located.rows[here])
        pieces = [slice(start, start + size) for start in range(0, samples.size, size)]
        return [_micro_batch(manifest, samples[piece], tokens[piece], trained[piece]) for piece in pieces]


def open_mixture(config: DataConfig, seed: int, manifests: Sequence[Manifest]) -> Mixture:
    """Return the order of the samples over `config.train`, whose `manifests` are given in that order.

    Raises:
        ConfigError: weights, limits or the schedule make no sense.
    """
    sources = [
        Source(
            name=name,
            rows=manifest.rows,
            weight=source.weight,
            limit=None if source.max_epochs is None else max(1, math.floor(source.max_epochs * manifest.rows)),
            fingerprint=manifest.fingerprint,
        )
        for (name, source), manifest in zip(config.train.items(), manifests, strict=True)
    ]
    return Mixture(sources, seed, [Change(change.sample, change.weights) for change in config.schedule])


def open_training_data(config: RunConfig) -> TrainingData:
    """Open the training data, once it and the validation data fit the tokenizer, the model and the length of the run.

    For one rank: the others get the result by broadcast. It reads the manifests and looks at no shard.

    Raises:
        ConfigError: a directory, manifest or tokenizer is missing or broken, or they do not fit each other, the model
            or the run.
    """
    data = config.data
    try:
        tokenizer = Tokenizer.load(Path(data.tokenizer))
    except DataError as error:
        raise ConfigError(f"data.tokenizer: {error}") from None
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the {tokenizer.vocab_size} tokens of"
            f" {data.tokenizer}; set model.vocab_size={tokenizer.vocab_size} or train a smaller tokenizer"
        )
    # Under the name that was written: `data.train: PATH` does not speak of names.
    train = {
        "data.train" if name == ONLY_DATASET else f"data.train.{name}": source.path
        for name, source in data.train.items()
    }
    _open_fitting(config, "data.validation", data.validation, tokenizer)
    manifests = [_open_fitting(config, key, directory, tokenizer) for key, directory in train.items()]
    for (key, directory), manifest in zip(train.items(), manifests, strict=True):
        if manifest.sequence_length != manifests[0].sequence_length:
            raise ConfigError(
                f"{key}: {directory} has sequences of {manifest.sequence_length} tokens, the first dataset of the"
                f" mixture of {manifests[0].sequence_length}; rebuild one of them"
            )
    mixture = open_mixture(data, config.seed, manifests)
    needed = samples_before(config.schedule, config.train.global_batch_size, config.train.steps)
    if mixture.length is not None and mixture.length < needed:
        raise ConfigError(
            f"data.train: with their max_epochs the datasets give {mixture.length} samples, but train.steps ="
            f" {config.train.steps} needs {needed}; raise a max_epochs or set"
            f" train.steps={mixture.length // config.train.global_batch_size}"
        )
    return TrainingData(tuple(map(Path, train.values())), tuple(manifests), mixture)


def _open_fitting(config: RunConfig, key: str, directory: str, tokenizer: Tokenizer) -> Manifest:
    try:
        manifest = Manifest.read(Path(directory))
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from None
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise ConfigError(
            f"{key}: {directory} was built with another tokenizer than data.tokenizer = {config.data.tokenizer};"
            " name the one it was built with, or rebuild it"
        )
    if manifest.sequence_length > config.model.block_size:
        raise ConfigError(
            f"{key}: {directory} has sequences of {manifest.sequence_length} tokens, more than model.block_size ="
            f" {config.model.block_size}; rebuild with --sequence-length {config.model.block_size} or raise"
            " model.block_size"
        )
    return manifest


def _read(
    reader: RowReader, manifest: Manifest, rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the tokens of `rows` and which of them are trained on, both (n, row_tokens)."""
    tokens = reader.rows(rows).astype(np.int64)
    # No text encodes to the pad token: every one was put there to fill a row.
    return tokens, reader.trainable(rows) & (tokens != manifest.control_ids[2])


def _micro_batch(
    manifest: Manifest, samples: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64], trained: npt.NDArray[np.bool_]
) -> MicroBatch:
    labels = np.where(trained[:, 1:], tokens[:, 1:], IGNORED)
    begin_id, end_id, _ = manifest.control_ids  # no text encodes to them
    starts = tokens[:, :-1] == begin_id
    starts[:, 1:] |= tokens[:, :-2] == end_id  # the rest of a document that a row's end has cut has no begin
    documents = np.cumsum(starts, axis=1)
    return MicroBatch(*map(torch.from_numpy, (samples, tokens[:, :-1], labels, documents)))
