"""Averages of a run's checkpoints, which evaluate and export as a run does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.errors import DataError
from data_prep.world import World
from pipeline.checkpoints.average import average_checkpoints
from pipeline.checkpoints.convert import convert_checkpoint, cut, write_checkpoint
from pipeline.checkpoints.manifest import WEIGHT, CheckpointManifest, Progress
from pipeline.checkpoints.reader import resolve_checkpoint
from pipeline.engine import Fragment
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluate import evaluate_checkpoint
from pipeline.export import export_checkpoint
from tests.pipeline.saved_checkpoint import save_checkpoint
from tests.pipeline.untrained_runs import untrained_run


def save(run_dir: Path, step: int, value: float, shape: list[int] | None = None) -> None:
    weight = torch.full((torch.Size(shape or [2, 3]).numel(),), value)
    (run_dir / "tokenizer").mkdir(parents=True, exist_ok=True)
    draft = CheckpointManifest(
        progress=Progress(step=step, samples=step, tokens=step),
        config={"seed": 1},
        data_fingerprint="data",
        tokenizer_sha256="tokenizer",
        shapes={"w": shape or [2, 3]},
        run="1234",
        health={"verdict": "healthy"},
        proof={"losses": {"1": 3.0}},
    )
    fragment = Fragment(parameter="w", start=0, weight=weight, optimizer_state={"exp_avg": -weight})
    save_checkpoint(run_dir, World(), [fragment], draft)


def test_the_average_moves_from_the_oldest_to_the_newest_by_one_minus_beta(tmp_path: Path) -> None:
    for step, value in enumerate([100.0, 1.0, 2.0, 4.0], start=1):
        save(tmp_path, step, value)
    record = average_checkpoints(tmp_path, last=3, beta=0.75)
    assert record["steps"] == [2, 3, 4]
    reader = resolve_checkpoint(Path(record["out"]))
    assert torch.equal(reader.weight("w"), torch.full((2, 3), (1 * 0.75 + 2 * 0.25) * 0.75 + 4 * 0.25))
    assert reader.manifest.progress.step == 4
    assert reader.manifest.optimizer_state == []
    assert not any((reader.manifest.run, reader.manifest.health, reader.manifest.proof))  # nobody measured the average
    assert json.loads((Path(record["out"]) / "average.json").read_text()) == record
    assert average_checkpoints(tmp_path, last=2, every=2)["steps"] == [2, 4]


def test_too_few_broken_or_unlike_checkpoints_leave_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0, [3, 3])
    save(tmp_path, 2, 1.0)
    save(tmp_path, 3, 1.0)
    with pytest.raises(CheckpointError, match=r"has 3 checkpoints, too few for --last 4 .*keep_last"):
        average_checkpoints(tmp_path, last=4)
    with pytest.raises(CheckpointError, match="of another model"):
        average_checkpoints(tmp_path, last=3)
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="tokenizer: missing"):
        average_checkpoints(tmp_path, last=2)
    (tmp_path / "elsewhere").rename(tmp_path / "tokenizer")
    (tmp_path / "checkpoints/step-00000002/shard-00000.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="step-00000002"):
        average_checkpoints(tmp_path, last=2)
    with pytest.raises(CheckpointError, match="nosuch: no such run"):
        average_checkpoints(tmp_path / "nosuch", last=2)
    with pytest.raises(ConfigError, match="beta in"):
        average_checkpoints(tmp_path, last=2, beta=1.0)
    assert not (tmp_path / "averages").exists()


def test_averages_and_conversions_are_evaluated_and_exported_as_a_run_is(workdir: Path) -> None:
    run = untrained_run(workdir, "run", files=2)
    second = resolve_checkpoint(run)
    layout = cut(second.manifest.shapes, 1)
    progress = replace(second.manifest.progress, step=2)
    kinds = dict.fromkeys(second.manifest.shapes, (WEIGHT,))
    write_checkpoint(run, replace(second.manifest, progress=progress), layout, kinds, second.slice)
    average_checkpoints(run, last=2, beta=0.5, out=workdir / "mean")
    convert_checkpoint(workdir / "mean", workdir / "parts", shards=3)
    shutil.rmtree(workdir / "mean")
    assert evaluate_checkpoint(workdir / "parts", [1, 2])["step"] == 2
    assert export_checkpoint(workdir / "parts", workdir / "export") == 0.0
    assert not (run / "eval").exists()  # it is not a checkpoint of the run
    with pytest.raises(DataError, match="parts: already exists"):
        average_checkpoints(run, last=2, out=workdir / "parts")
