"""From a step number to this rank's rows: the global order does not know ranks, and the only state is the step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from data_prep.errors import DataError
from data_prep.manifest import Manifest
from data_prep.order import sample_rows
from data_prep.shards import RowReader
from data_prep.tokenizer import Tokenizer
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config import RunConfig


@dataclass(kw_only=True)
class DataConfig:
    """Where the tokens are."""

    train: str
    """Directory of the training dataset (`rookery data build`)."""
    validation: str
    """Directory of the validation dataset, of the same tokenizer."""
    tokenizer: str
    """Directory of the tokenizer; copied into the run, so that the run can be exported on its own."""


class MicroBatch(NamedTuple):
    """Rows of one forward pass.

    Attributes:
        samples: (B,) int64 global sample indices.
        input_ids: (B, S) int64.
        labels: (B, S) int64, the following token of each position.
    """

    samples: torch.Tensor
    input_ids: torch.Tensor
    labels: torch.Tensor


def to_micro_batch(samples: np.ndarray, rows: np.ndarray) -> MicroBatch:
    """Split rows (B, S + 1) of tokens into inputs and labels."""
    tokens = torch.from_numpy(rows.astype(np.int64))
    return MicroBatch(torch.from_numpy(samples), tokens[:, :-1], tokens[:, 1:])


class Loader:
    """Serves the global batch that follows any number of consumed samples, cut for one rank.

    Sample i of the run is row `sample_rows(i)` of the dataset. Ranks take contiguous slices of a global batch, so
    neither the samples of a batch nor their order depend on the world size or the micro-batch split.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, *, seed: int, global_batch_size: int, micro_batch_size: int
    ) -> None:
        self._reader = RowReader(directory, manifest)
        self._rows = manifest.rows
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size

    def micro_batches(self, consumed_samples: int, rank: int, world_size: int) -> list[MicroBatch]:
        """Return the micro-batches of `rank` in the global batch after `consumed_samples`, in order."""
        share = self._global_batch_size // world_size
        first = consumed_samples + rank * share
        samples = np.arange(first, first + share, dtype=np.int64)
        rows = sample_rows(samples, self._rows, self._seed)
        batches = []
        for start in range(0, share, self._micro_batch_size):
            part = slice(start, start + self._micro_batch_size)
            batches.append(to_micro_batch(samples[part], np.stack([self._reader.row(int(row)) for row in rows[part]])))
        return batches

    def close(self) -> None:
        """Close the shard files."""
        self._reader.close()


def open_training_data(config: RunConfig) -> Manifest:
    """Return the manifest of the training data, once it and the validation data fit the tokenizer and the model.

    Raises:
        DataError: a directory, manifest, part or tokenizer is missing or broken.
        ConfigError: they do not fit each other or the model.
    """
    data, model = config.data, config.model
    try:
        tokenizer = Tokenizer.load(Path(data.tokenizer))
    except DataError as error:
        raise ConfigError(f"data.tokenizer: {error}") from None
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {model.vocab_size} is smaller than the {tokenizer.vocab_size} tokens of"
            f" {data.tokenizer}; set model.vocab_size={tokenizer.vocab_size} or train a smaller tokenizer"
        )
    manifests = {}
    for key, directory in (("data.train", data.train), ("data.validation", data.validation)):
        try:
            manifest = manifests[key] = Manifest.load(Path(directory))
        except DataError as error:
            raise ConfigError(f"{key}: {error}") from None
        if manifest.tokenizer_sha256 != tokenizer.sha256:
            raise ConfigError(
                f"{key}: {directory} was built with another tokenizer than data.tokenizer = {data.tokenizer};"
                " name the one it was built with, or rebuild it"
            )
        if manifest.sequence_length > model.block_size:
            raise ConfigError(
                f"{key}: {directory} has sequences of {manifest.sequence_length} tokens, more than model.block_size ="
                f" {model.block_size}; rebuild with --sequence-length {model.block_size} or raise model.block_size"
            )
    return manifests["data.train"]
