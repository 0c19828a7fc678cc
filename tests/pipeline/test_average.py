"""`rookery checkpoints`: averages that evaluate and export as a run does, and what is listed and verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_prep.world import World
from pipeline.average import average_checkpoints
from pipeline.checkpoint import Progress, describe_checkpoints, list_checkpoints, resolve_checkpoint, save_checkpoint
from pipeline.engine import Fragment
from pipeline.errors import CheckpointError, ConfigError
from tests.ranks import rookery


def save(run_dir: Path, step: int, value: float, shape: list[int] | None = None) -> None:
    weight = torch.full((torch.Size(shape or [2, 3]).numel(),), value)
    (run_dir / "tokenizer").mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        run_dir,
        World(),
        iter([Fragment(parameter="w", start=0, weight=weight, optimizer_state={"exp_avg": -weight})]),
        {"w": shape or [2, 3]},
        progress=Progress(step=step, samples=step, tokens=step),
        config={"seed": 1},
        data_fingerprint="data",
        tokenizer_sha256="tokenizer",
    )


def test_the_average_moves_from_the_oldest_to_the_newest_by_one_minus_beta(tmp_path: Path) -> None:
    for step, value in enumerate([100.0, 1.0, 2.0, 4.0], start=1):
        save(tmp_path, step, value)
    record = average_checkpoints(tmp_path, last=3, beta=0.75)
    assert record["steps"] == [2, 3, 4]
    reader = resolve_checkpoint(Path(record["out"]))
    assert torch.equal(reader.weight("w"), torch.full((2, 3), (1 * 0.75 + 2 * 0.25) * 0.75 + 4 * 0.25))
    assert reader.manifest.progress.step == 4
    assert reader.manifest.optimizer_state == []
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
    (tmp_path / "checkpoints/step-00000002/shard-00000.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="step-00000002"):
        average_checkpoints(tmp_path, last=2)
    with pytest.raises(ConfigError, match="beta in"):
        average_checkpoints(tmp_path, last=2, beta=1.0)
    assert not (tmp_path / "averages").exists()


def test_a_description_names_what_is_broken(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, 1.0)
    (tmp_path / "checkpoints/step-00000002/manifest.json").write_text("{}")
    (tmp_path / "checkpoints/step-00000003/shard-00000.safetensors").write_bytes(b"broken")
    listed = describe_checkpoints(tmp_path, verify=False)
    assert [entry["name"] for entry in listed] == [path.name for path in list_checkpoints(tmp_path)]
    assert [entry["problem"] is None for entry in listed] == [True, False, True]
    assert [entry["problem"] is None for entry in describe_checkpoints(tmp_path, verify=True)] == [True, False, False]
    assert listed[0]["step"] == listed[0]["samples"] == listed[0]["ranks"] == 1
    assert listed[0]["bytes"] == (tmp_path / "checkpoints/step-00000001/shard-00000.safetensors").stat().st_size


def test_an_average_is_evaluated_and_exported_as_a_run_is(workdir: Path) -> None:
    trained = rookery(
        "train", "test.yaml", "train.steps=6", "checkpoint.every=2", "checkpoint.keep_last=3", cwd=workdir
    )
    assert trained.returncode == 0, trained.stderr
    done = rookery("checkpoints", "average", "run", "--last", "3", "--beta", "0.5", "--out", "mean", cwd=workdir)
    assert done.returncode == 0, done.stderr
    evaluated = rookery("eval", "mean", "--depths", "1,2", "--max-rows", "4", "--json", cwd=workdir)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["step"] == 6
    exported = rookery("export", "mean", "export", "--json", cwd=workdir)
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["max_abs_logit_diff"] == 0.0
    assert not (workdir / "run/eval").exists()  # it is not a checkpoint of the run
    again = rookery("checkpoints", "average", "run", "--last", "3", "--out", "mean", cwd=workdir)
    assert again.returncode == 12
    assert "mean: already exists" in again.stderr


def test_verify_ends_with_12_if_a_checkpoint_is_broken(tmp_path: Path) -> None:
    save(tmp_path / "run", 1, 1.0)
    listed = rookery("checkpoints", "list", "run", "--json", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert [entry["step"] for entry in json.loads(listed.stdout)["checkpoints"]] == [1]
    assert rookery("checkpoints", "verify", "run", cwd=tmp_path).returncode == 0
    (tmp_path / "run/checkpoints/step-00000001/shard-00000.safetensors").write_bytes(b"broken")
    verified = rookery("checkpoints", "verify", "run", "--json", cwd=tmp_path)
    assert verified.returncode == 12
    assert not json.loads(verified.stdout)["ok"]
    absent = rookery("checkpoints", "list", "nowhere", cwd=tmp_path)
    assert absent.returncode == 12
    assert "nowhere: no run with a checkpoint" in absent.stderr
