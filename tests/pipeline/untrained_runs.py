"""Runs with a checkpoint of random weights that nobody trained, in any number of files: quick to make, of any size."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from data_prep.tokenizer import Tokenizer
from pipeline.checkpoints.convert import cut, write_checkpoint
from pipeline.checkpoints.manifest import WEIGHT, CheckpointManifest, Progress
from pipeline.config import load_config, to_yaml
from pipeline.model import build_meta_model


def untrained_run(workdir: Path, name: str, *overrides: str, files: int = 1, fragments: int = 1) -> Path:
    """Make the run `workdir`/`name` of test.yaml with one checkpoint, at step 1.

    Args:
        workdir: a directory as the fixture of this name gives it.
        name: of the run.
        overrides: of the configuration.
        files: number of files, over which the elements of all parameters are spread evenly.
        fragments: in how many pieces each file holds its part of a parameter.
    """
    run = workdir / name
    data = [f"data.{part}={workdir}/data/{part}" for part in ("train", "validation")]
    config = load_config(str(workdir / "test.yaml"), [f"run_dir={run}", *data, *overrides])
    run.mkdir()
    (run / "run.yaml").write_text(to_yaml(config))
    shutil.copytree(workdir / "tokenizer", run / "tokenizer")
    shapes = {key: list(value.shape) for key, value in build_meta_model(config.model).state_dict().items()}
    source = CheckpointManifest(
        progress=Progress(step=1, samples=8, tokens=256),
        config=dataclasses.asdict(config),
        data_fingerprint="none",
        tokenizer_sha256=Tokenizer.load(run / "tokenizer").sha256,
        shapes=shapes,
    )
    layout = [
        [
            (key, start + first, min(first + -(-numel // fragments), numel) - first)
            for key, start, numel in pieces
            for first in range(0, numel, -(-numel // fragments))
        ]
        for pieces in cut(shapes, files)
    ]
    noise = torch.Generator().manual_seed(1)

    def read(parameter: str, kind: str, start: int, numel: int) -> torch.Tensor:
        return torch.empty(numel).normal_(0.0, 0.02, generator=noise)

    write_checkpoint(run, source, layout, dict.fromkeys(shapes, (WEIGHT,)), read)
    return run
