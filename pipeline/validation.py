"""Validation in the course of the training: loss at several depths, for a set share of the training's FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_prep.manifest import Manifest
from data_prep.shards import RowReader
from data_prep.world import World
from monitoring.runlog import Record
from pipeline.depth import Depth
from pipeline.errors import ConfigError
from pipeline.flops import sequence_flops
from pipeline.loader import IGNORED, MicroBatch, read_micro_batch
from pipeline.model import RecurrentDepthModel, stream_key
from pipeline.samplers import expectation
from pipeline.trace import Trace

if TYPE_CHECKING:
    from pipeline.config import RunConfig


@dataclass(kw_only=True)
class ValidationConfig:
    """How often the loss on `data.validation` is measured, at which depths, and how much that may cost."""

    every: int | None = None
    """Steps between validations; null for none."""
    depths: list[int] = field(default_factory=list)
    """Numbers of iterations; empty for 1, half the mean recurrence, the mean and its double."""
    budget: float = 0.02
    """FLOPs of the validations over those of the training; says how many rows are read, evenly over the dataset."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.every is not None and self.every < 1:
            raise ConfigError(f"validation.every: {self.every} is not positive; null for no validation")
        if any(depth < 1 for depth in self.depths):
            raise ConfigError(f"validation.depths: {self.depths} holds a depth below 1")
        if not 0.0 < self.budget <= 1.0:
            raise ConfigError(f"validation.budget: {self.budget} is not in (0, 1]")


def validation_depths(config: RunConfig) -> list[int]:
    """Return the depths of a run's validations, ascending and each once."""
    mean = config.depth.mean_recurrence
    return sorted(set(config.validation.depths or (1, max(1, round(mean / 2)), round(mean), round(2 * mean))))


def validation_rows(config: RunConfig) -> int:
    """Return how many rows the budget of a run pays for, at full batch, mean depth and the model's longest sequence.

    Raises:
        ConfigError: for none; with the smallest `validation.every` or budget that pays for one.
    """
    validation, depths = config.validation, validation_depths(config)
    assert validation.every is not None
    flops = sequence_flops(config.model)  # the same rows whatever is computed again
    mean = round(expectation(config.depth.sampler, config.depth.mean_recurrence))
    k = mean if config.depth.sampler == "full" else min(mean, config.depth.mean_backprop_depth)
    training = validation.every * config.train.global_batch_size * flops.model(Depth(mean - k, k))
    # Each further depth passes the coda and the head again.
    row = flops.forward(depths[-1]) + (len(depths) - 1) * flops.outside
    rows = int(validation.budget * training / row)
    if rows < 1:
        raise ConfigError(
            f"validation.budget: {validation.budget} of {validation.every} steps does not pay for one row at depths"
            f" {depths}; raise it to {row / training:.2g}, or validation.every to"
            f" {-(-validation.every * row // (validation.budget * training)):.0f}"
        )
    return rows


@torch.no_grad()
def losses_at_depths(
    forward: Callable[..., torch.Tensor],
    model: RecurrentDepthModel,
    batch: MicroBatch,
    depths: Sequence[int],
    config: RunConfig,
) -> tuple[torch.Tensor, Trace]:
    """Return the summed cross-entropy (len(depths),) of a batch at each of `depths`, ascending, and what the loop did.

    The first states follow from (seed, row) alone, apart from those of the training.

    Args:
        forward: what to call in place of the model, which it is inside.
        model: the model.
        batch: rows of a dataset; `batch.samples` are their numbers.
        depths: numbers of iterations, ascending.
        config: the configuration of the run.
    """
    trace, device = Trace(keep=frozenset(depths)), batch.input_ids.device
    keys = [stream_key(config.seed, "evaluation", int(sample)) for sample in batch.samples]
    documents = batch.documents if config.train.document_mask else None
    state = model.initial_state(torch.tensor(keys, device=device), batch.input_ids.shape[1])
    return forward(batch.input_ids, state, (depths[-1], 0), batch.labels, trace, documents), trace


class Validation:
    """Measures the loss of a model in training, the same rows every time; a collective.

    Args:
        config: the resolved configuration.
        world: the ranks.
        device: this rank's.
    """

    def __init__(self, config: RunConfig, world: World, device: torch.device) -> None:
        self._config, self._world, self._device = config, world, device
        self._every = config.validation.every
        if self._every is None:
            return
        directory = Path(config.data.validation)
        with world.guard("validation dataset"):
            found = Manifest.read(directory) if world.rank == 0 else None  # `prepare` has looked for its shards
        manifest = world.broadcast(found)
        assert manifest is not None
        with world.guard("validation dataset"):
            rows = min(validation_rows(config), manifest.rows)
            self._reader = RowReader(directory, manifest)
        self._manifest = manifest
        self._rows = np.arange(rows, dtype=np.int64) * manifest.rows // rows
        self._depths = validation_depths(config)

    def due(self, step: int) -> bool:
        """Say whether a validation follows the completed step `step`."""
        return self._every is not None and (step % self._every == 0 or step == self._config.train.steps)

    def run(self, forward: Callable[..., torch.Tensor], model: RecurrentDepthModel) -> Record:
        """Return {"validation": {depth: loss in nats a token}, "validation_tokens": number}; a collective.

        Args:
            forward: what to call in place of the model, which it is inside.
            model: the model, whose parameters may lie sharded.

        Raises:
            DataError: a row is damaged; on every rank.
        """
        # Ranks meet in the forward pass at ZeRO stage 3, so all that can fail alone comes before it.
        with self._world.guard("validation data"):
            batches = list(self._batches())
        sums = torch.zeros(len(self._depths), dtype=torch.float64, device=self._device)
        for batch in batches:
            sums += losses_at_depths(forward, model, batch.to(self._device), self._depths, self._config)[0]
        tokens = sum(batch.trained_tokens for batch in batches)
        total = self._world.sum(np.array([*sums.tolist(), tokens]))
        losses = dict(zip(map(str, self._depths), (total[:-1] / max(total[-1], 1.0)).tolist(), strict=True))
        return {"validation": losses, "validation_tokens": int(total[-1])}

    def close(self) -> None:
        """Close the dataset."""
        if self._every is not None:
            self._reader.close()

    def _batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's part of the rows, in as many batches as every other rank has."""
        size = self._config.train.micro_batch_size
        number = -(-len(self._rows) // (size * self._world.size))
        first = self._world.rank * number * size
        for start in range(first, first + number * size, size):
            places = np.arange(start, start + size)
            beyond = places >= len(self._rows)
            rows = self._rows[np.where(beyond, 0, places)]
            batch = read_micro_batch(self._reader, self._manifest, rows, rows)
            batch.labels[torch.from_numpy(beyond)] = IGNORED
            yield batch
