"""Loss at several depths from one pass of the loop: the state after i iterations is the same for every depth >= i."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.manifest import Manifest
from data_prep.shards import RowReader
from monitoring.runlog import write_atomic
from pipeline.accelerator import select_device
from pipeline.checkpoints.manifest import WEIGHT
from pipeline.checkpoints.reader import CheckpointReader, resolve_checkpoint
from pipeline.config import RunConfig, config_from_record
from pipeline.errors import ConfigError
from pipeline.loader import read_micro_batch
from pipeline.model import RecurrentDepthModel, reference_name
from pipeline.validation import losses_at_depths

_ROWS_PER_BATCH = 16


def parse_depths(text: str) -> list[int]:
    """Return the depths named in "1,2,4", ascending and each once.

    Raises:
        ConfigError: not a list of positive integers.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--depths {text!r}: not a comma-separated list of positive integers, as in 1,2,4,8")
    return sorted({int(part) for part in parts})


def load_model(reader: CheckpointReader, device: torch.device) -> tuple[RecurrentDepthModel, RunConfig]:
    """Return the model of a checkpoint with its float32 weights, and the configuration that it was trained with."""
    config = config_from_record(reader.manifest.config, str(reader.directory))
    with torch.device("meta"):
        model = RecurrentDepthModel(config.model)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            reader.read(reference_name(name), WEIGHT, 0, parameter.view(-1))
    return model.eval(), config


def evaluate_checkpoint(
    checkpoint: Path,
    depths: list[int],
    *,
    data: Path | None = None,
    max_rows: int | None = None,
    other_owners: bool = False,
) -> dict[str, Any]:
    """Measure the mean loss at each depth, and the state along the loop of the deepest; keep the result with the run.

    Args:
        checkpoint: a checkpoint, or a run for its newest intact one.
        depths: numbers of iterations.
        data: a dataset; the run's validation set if None.
        max_rows: use the first rows only.
        other_owners: read a checkpoint that belongs to another user.

    Returns:
        step, samples and tokens of the training, evaluated_tokens, loss {depth: nats a token}, state_rms and
        relative_residual (one value an iteration),
        unigram_entropy of the dataset, mean_recurrence of the training, checkpoint.

    Raises:
        CheckpointError, ConfigError, DataError: something named is missing, broken or does not fit.
    """
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"--max-rows {max_rows}: not a positive number of rows")
    reader = resolve_checkpoint(checkpoint, other_owners=other_owners)
    device = select_device(0)
    model, config = load_model(reader, device)
    directory = Path(config.data.validation) if data is None else data
    manifest = Manifest.load(directory)
    if manifest.tokenizer_sha256 != reader.manifest.tokenizer_sha256:
        raise ConfigError(f"{directory}: built with another tokenizer than {reader.directory} was trained with")
    if manifest.sequence_length > config.model.block_size:
        raise ConfigError(
            f"{directory}: sequences of {manifest.sequence_length} tokens exceed model.block_size ="
            f" {config.model.block_size}; rebuild it with --sequence-length {config.model.block_size}"
        )
    rows = manifest.rows if max_rows is None else min(max_rows, manifest.rows)
    losses = torch.zeros(len(depths), dtype=torch.float64)
    traces, tokens = [], 0
    row_reader = RowReader(directory, manifest)
    for start in range(0, rows, _ROWS_PER_BATCH):
        samples = np.arange(start, min(start + _ROWS_PER_BATCH, rows), dtype=np.int64)
        batch = read_micro_batch(row_reader, manifest, samples, samples)
        tokens += batch.trained_tokens
        added, trace = losses_at_depths(model, model, batch.to(device), depths, config)
        losses += added.cpu()
        traces.append((len(samples), trace.to_lists()))
    row_reader.close()
    result = {
        **dataclasses.asdict(reader.manifest.progress),
        "checkpoint": str(reader.directory),
        "evaluated_tokens": tokens,
        "loss": dict(zip(map(str, depths), (losses / max(tokens, 1)).tolist(), strict=True)),
        **{name: _weighted_mean(traces, name) for name in ("state_rms", "relative_residual")},
        "unigram_entropy": manifest.unigram_entropy,
        "mean_recurrence": config.depth.mean_recurrence,
    }
    if data is None and max_rows is None:
        _keep(reader, result)
    return result


def _weighted_mean(traces: list[tuple[int, dict[str, list[float]]]], name: str) -> list[float]:
    weights = np.array([weight for weight, _ in traces], dtype=np.float64)
    values: list[float] = np.average([series[name] for _, series in traces], axis=0, weights=weights).tolist()
    return values


def _keep(reader: CheckpointReader, result: dict[str, Any]) -> None:
    run_dir = reader.directory.parent.parent
    if not (run_dir / "run.yaml").is_file():  # a checkpoint that was copied out of its run
        return
    folder = run_dir / "eval"
    folder.mkdir(exist_ok=True)
    path = folder / f"{reader.directory.name}.json"
    write_atomic(path, json.dumps(_merged(path, result)).encode())


def _merged(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return `result` with the depths of an earlier evaluation of the same checkpoint on the same tokens."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return result
    same = ("step", "evaluated_tokens", "unigram_entropy")
    if not isinstance(earlier, dict) or any(earlier.get(name) != result[name] for name in same):
        return result
    losses = {**earlier["loss"], **result["loss"]}
    deeper = max((earlier, result), key=lambda evaluation: len(evaluation["state_rms"]))
    return {**deeper, "loss": {depth: losses[depth] for depth in sorted(losses, key=int)}}
