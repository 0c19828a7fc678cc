"""A few tokens that every checkpoint is asked about: a model that was loaded right answers as it did when saved."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pipeline.engine import release_gathered
from pipeline.errors import CheckpointError
from pipeline.loader import Loader, MicroBatch, Share, TrainingData
from pipeline.validation import losses_at_depths

if TYPE_CHECKING:
    from pipeline.config import RunConfig

_TOKENS = 16
_DEEPEST = 4
# The same weights on other hardware, or in another order of summation.
_TOLERANCES = {"fp32": 1e-3, "bf16": 1e-2, "fp16": 1e-2}


class ProbeBatch:
    """The first tokens of the run's first sample, at depth 1 and a greater one; the same on every rank.

    Args:
        config: the resolved configuration.
        data: the training data, whose beginning does not change as long as the run can be resumed.
        device: this rank's.

    Raises:
        DataError: the row is damaged.
    """

    def __init__(self, config: RunConfig, data: TrainingData, device: torch.device) -> None:
        loader = Loader(data, 1)
        try:
            (row,) = loader.micro_batches(Share(0, 1, (0,)))
        finally:
            loader.close()
        ids = row.input_ids[:, : _TOKENS + 1]
        # Targets everywhere, also where the data's masks leave them out.
        self._batch = MicroBatch(row.samples, ids[:, :-1], ids[:, 1:], row.documents[:, : ids.shape[1] - 1]).to(device)
        # Whether documents see each other may change at a restart.
        self._config = replace(config, train=replace(config.train, document_mask=False))
        self.depths = [1, max(2, min(_DEEPEST, round(config.depth.mean_recurrence)))]

    def ask(self, engine: Any) -> dict[str, Any]:
        """Return {"losses": {depth: nats a token}, "precision"} of an engine's model; a collective at ZeRO stage 3.

        Not compiled: another shape would be compiled anew, and a compiled core answers a little differently.
        """
        module = engine.module
        recurrence = module.transformer.recurrence
        compiled, recurrence.compiled = recurrence.compiled, None
        try:
            sums, _ = losses_at_depths(module, module, self._batch, self.depths, self._config)
        finally:
            recurrence.compiled = compiled
            release_gathered(engine)
        losses = (sums.cpu() / self._batch.labels.numel()).tolist()
        return {
            "losses": dict(zip(map(str, self.depths), losses, strict=True)),
            "precision": self._config.train.precision,
        }


def compare(saved: dict[str, Any], found: dict[str, Any], tolerance: float | None) -> dict[str, list[float]]:
    """Return depth -> [loss when saved, loss now]; empty for a checkpoint without proof.

    Args:
        saved: the answers in the manifest.
        found: the answers of what was loaded.
        tolerance: relative difference that is allowed; None for that of the less exact of both precisions.

    Raises:
        CheckpointError: they differ by more.
    """
    if not saved:
        return {}
    if tolerance is None:
        tolerance = max(_TOLERANCES[each["precision"]] for each in (saved, found))
    pairs = {
        depth: [loss, found["losses"][depth]] for depth, loss in saved["losses"].items() if depth in found["losses"]
    }
    for depth, (then, now) in pairs.items():
        if not abs(then - now) <= tolerance * abs(then):
            raise CheckpointError(
                f"the probe batch has loss {now:.6f} at depth {depth}, but {then:.6f} when the checkpoint was saved:"
                " files and checksums agree, so that code, libraries or this machine's arithmetic do not; go back to"
                " what wrote it, or allow the difference with checkpoint.proof_tolerance"
            )
    return pairs
