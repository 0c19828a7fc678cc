"""Averages of a run's checkpoints, which generalise better than the last one while the learning rate is high."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints.convert import apart_from_run, cut, write_checkpoint
from pipeline.checkpoints.manifest import WEIGHT
from pipeline.checkpoints.reader import CheckpointReader, saved_in
from pipeline.errors import CheckpointError, ConfigError


def average_checkpoints(
    run_dir: Path,
    *,
    last: int,
    beta: float = 0.9,
    every: int = 1,
    out: Path | None = None,
    other_owners: bool = False,
) -> dict[str, Any]:
    """Write the exponential moving average of a run's newest checkpoints, from the oldest of them to the newest.

    The average begins as the oldest checkpoint and moves by 1 - beta towards each of the others. Huginn-0125 took
    beta = 0.9 and every 7th of the last 75 (arXiv 2502.05171, section 4): last = 11, every = 7. The optimizer's state
    is left out. One parameter of one checkpoint is read at a time.

    Args:
        run_dir: the run.
        last: number of checkpoints to average.
        beta: weight of the average so far, in [0, 1); 0 gives the newest checkpoint.
        every: take every so manieth checkpoint, back from the newest.
        out: directory to make, `RUN/averages/step-...` if None. It holds checkpoints/step-.../ and the tokenizer, so
            that evaluation and export take it as they take a run.
        other_owners: read files that belong to another user.

    Returns:
        What average.json says: run, beta, steps (oldest first), out.

    Raises:
        ConfigError: the arguments are out of range.
        CheckpointError: there are fewer checkpoints, one is broken, or they are not of one model.
        DataError: `out` exists.
    """
    if last < 2 or every < 1 or not 0.0 <= beta < 1.0:
        raise ConfigError(f"--last {last} --every {every} --beta {beta}: need last >= 2, every >= 1, beta in [0, 1)")
    found = saved_in(run_dir)
    paths = found[::-1][::every][:last][::-1]
    if len(paths) < last:
        raise CheckpointError(
            f"{run_dir}: has {len(found)} checkpoints, too few for --last {last} --every {every}; name fewer, or train"
            " with a larger checkpoint.keep_last"
        )
    readers = [CheckpointReader(path, other_owners=other_owners) for path in paths]
    newest = readers[-1].manifest
    for reader in readers:
        if reader.manifest.shapes != newest.shapes:
            raise CheckpointError(f"{reader.directory}: of another model than {paths[-1]}; name a smaller --last")
    if out is None:
        out = run_dir / "averages" / f"{paths[-1].name}-last-{last}-every-{every}-beta-{beta:g}"
    steps = [reader.manifest.progress.step for reader in readers]
    record = {"run": str(run_dir), "beta": beta, "steps": steps, "out": str(out)}

    def mean(parameter: str, kind: str, start: int, numel: int) -> torch.Tensor:
        value = readers[0].slice(parameter, kind, start, numel)
        for reader in readers[1:]:
            value.lerp_(reader.slice(parameter, kind, start, numel), 1.0 - beta)
        return value

    # Nothing of what was measured, nor the identity of the run, holds for the average.
    source = replace(newest, run="", loss_scale={}, health={}, validation={}, proof={})
    with apart_from_run(run_dir, out) as partial:
        write_checkpoint(partial, source, cut(newest.shapes, 1), dict.fromkeys(newest.shapes, (WEIGHT,)), mean)
        (partial / "average.json").write_text(json.dumps(record), encoding="utf-8")
    return record
