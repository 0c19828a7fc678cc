"""What iterating brings: the loss of a fixed text at one iteration and at the mean depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from data_prep.manifest import Manifest, part_problem
from data_prep.shards import RowReader
from data_prep.world import World
from pipeline.engine import release_gathered
from pipeline.loader import Loader, MicroBatch, Share, TrainingData, read_micro_batch
from pipeline.validation import losses_at_depths

if TYPE_CHECKING:
    from pipeline.config import RunConfig

_TOKENS = 1024


class DepthGain:
    """The first tokens of the first row of the validation data, or of the run's first sample where that is not there.

    At most 1024, so that one measurement in a hundred steps costs little even where a rank's share of a step is one
    long sequence. All ranks have the same row, which rank 0 reads; the constructor is a collective.

    Args:
        config: the resolved configuration.
        data: the training data.
        world: the ranks.
        device: this rank's.

    Raises:
        DataError: the row is damaged; on every rank.
    """

    def __init__(self, config: RunConfig, data: TrainingData, world: World, device: torch.device) -> None:
        own: list[npt.NDArray[np.int64]] | None = None  # no tensors: the control plane carries plain data
        with world.guard("depth gain"):
            if world.rank == 0:
                own = [tensor[..., :_TOKENS].numpy().copy() for tensor in _first_row(config, data)]
        arrays = world.broadcast(own)
        assert arrays is not None
        row = MicroBatch(*map(torch.from_numpy, arrays))
        self._config, self._batch = config, row.to(device)
        self._tokens, self._depth = row.trained_tokens, round(config.depth.mean_recurrence)

    def measure(self, engine: Any) -> dict[str, float]:
        """Return {"shallow": loss at depth 1, "deep": loss at the mean depth, "depth": that depth}, in nats a token.

        Empty where the mean depth is 1, or masks leave nothing of the row. A collective at ZeRO stage 3; the answer is
        the same on every rank. Not compiled: another shape would be compiled anew.
        """
        if self._depth < 2 or not self._tokens:
            return {}
        module = engine.module
        recurrence = module.transformer.recurrence
        compiled, recurrence.compiled = recurrence.compiled, None
        try:
            sums, _ = losses_at_depths(module, module, self._batch, [1, self._depth], self._config)
        finally:
            recurrence.compiled = compiled
            release_gathered(engine)
        shallow, deep = (sums.cpu() / self._tokens).tolist()
        return {"shallow": shallow, "deep": deep, "depth": self._depth}


def _first_row(config: RunConfig, data: TrainingData) -> MicroBatch:
    directory = Path(config.data.validation)
    manifest = Manifest.read(directory)
    if part_problem(directory, manifest.parts[0]) is None:
        reader, first = RowReader(directory, manifest), np.zeros(1, dtype=np.int64)
        try:
            return read_micro_batch(reader, manifest, first, first)
        finally:
            reader.close()
    loader = Loader(data, 1)
    try:
        (row,) = loader.micro_batches(Share(0, 1, (0,)))
    finally:
        loader.close()
    return row
