"""Averages of a run's checkpoints, which generalise better than the last one while the learning rate is high."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data_prep.files import published_directory
from data_prep.world import World
from pipeline.checkpoint import CheckpointReader, list_checkpoints, save_checkpoint
from pipeline.engine import Fragment
from pipeline.errors import CheckpointError, ConfigError


def average_checkpoints(
    run_dir: Path, *, last: int, beta: float = 0.9, every: int = 1, out: Path | None = None
) -> dict[str, Any]:
    """Write the exponential moving average of a run's newest checkpoints, from the oldest of them to the newest.

    The average begins as the oldest checkpoint and moves by 1 - beta towards each of the others. Huginn-0125 took
    beta = 0.9 and every 7th of the last 75 (arXiv 2502.05171, section 4): last = 11, every = 7. The optimizer's state
    is left out.

    Args:
        run_dir: the run.
        last: number of checkpoints to average.
        beta: weight of the average so far, in [0, 1); 0 gives the newest checkpoint.
        every: take every so manieth checkpoint, back from the newest.
        out: directory to make, `RUN/averages/step-...` if None. It holds checkpoints/step-.../ and the tokenizer, so
            that evaluation and export take it as they take a run.

    Returns:
        What average.json says: run, beta, steps (oldest first), out.

    Raises:
        ConfigError: the arguments are out of range.
        CheckpointError: there are fewer checkpoints, one is broken, or they are not of one model.
        DataError: `out` exists.
    """
    if last < 2 or every < 1 or not 0.0 <= beta < 1.0:
        raise ConfigError(f"--last {last} --every {every} --beta {beta}: need last >= 2, every >= 1, beta in [0, 1)")
    paths = list_checkpoints(run_dir)[::-1][::every][:last][::-1]
    if len(paths) < last:
        found = len(list_checkpoints(run_dir))
        raise CheckpointError(
            f"{run_dir}: has {found} checkpoints, too few for --last {last} --every {every}; name fewer, or train with"
            " a larger checkpoint.keep_last"
        )
    if not (run_dir / "tokenizer").is_dir():
        raise CheckpointError(f"{run_dir / 'tokenizer'}: missing, so the average could not be used; restore it")
    readers = [CheckpointReader(path) for path in paths]
    newest = readers[-1].manifest
    for reader in readers:
        if reader.manifest.shapes != newest.shapes:
            raise CheckpointError(f"{reader.directory}: of another model than {paths[-1]}; name a smaller --last")
    if out is None:
        out = run_dir / "averages" / f"{paths[-1].name}-last-{last}-every-{every}-beta-{beta:g}"
    steps = [reader.manifest.progress.step for reader in readers]
    record = {"run": str(run_dir), "beta": beta, "steps": steps, "out": str(out)}
    with published_directory(out) as partial:
        shutil.copytree(run_dir / "tokenizer", partial / "tokenizer")
        save_checkpoint(
            partial,
            World(),
            _averages(readers, beta),
            newest.shapes,
            progress=newest.progress,
            config=newest.config,
            data_fingerprint=newest.data_fingerprint,
            tokenizer_sha256=newest.tokenizer_sha256,
        )
        (partial / "average.json").write_text(json.dumps(record), encoding="utf-8")
    return record


def _averages(readers: list[CheckpointReader], beta: float) -> Iterator[Fragment]:
    """Yield every parameter's average, reading one parameter of one checkpoint at a time."""
    for name in readers[0].manifest.shapes:
        mean = readers[0].weight(name).clone()
        for reader in readers[1:]:
            mean.lerp_(reader.weight(name), 1.0 - beta)
        yield Fragment(parameter=name, start=0, weight=torch.flatten(mean), optimizer_state={})
