"""Checkpoints: whole or absent, checked when read, any slice from any pieces, nothing outside their directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.world import World
from pipeline.checkpoint import (
    WEIGHT,
    CheckpointReader,
    Progress,
    list_checkpoints,
    newest_valid,
    prune_checkpoints,
    resolve_checkpoint,
    save_checkpoint,
)
from pipeline.engine import Fragment
from pipeline.errors import CheckpointError

VALUES = torch.arange(60, dtype=torch.float32)


def fragments(cuts: list[int]) -> Iterator[Fragment]:
    edges = [0, *cuts, 60]
    for start, end in pairwise(edges):
        yield Fragment(
            parameter="w", start=start, weight=VALUES[start:end], optimizer_state={"exp_avg": -VALUES[start:end]}
        )


def save(run_dir: Path, step: int, cuts: list[int] | None = None) -> Path:
    return save_checkpoint(
        run_dir,
        World(),
        fragments(cuts or [7, 31]),
        {"w": [6, 10]},
        progress=Progress(step=step, samples=step * 2, tokens=step * 8),
        config={"seed": 1},
        data_fingerprint="data",
        tokenizer_sha256="tokenizer",
    )


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(1, 59), unique=True).map(sorted),
    bounds=st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted),
)
def test_any_slice_is_found_in_any_pieces(
    cuts: list[int], bounds: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    reader = CheckpointReader(save(tmp_path_factory.mktemp("run"), 1, cuts))
    start, end = bounds
    assert torch.equal(reader.slice("w", WEIGHT, start, end - start), VALUES[start:end])
    assert torch.equal(reader.slice("w", "exp_avg", start, end - start), -VALUES[start:end])
    assert torch.equal(reader.weight("w"), VALUES.view(6, 10))


def test_counters_return_and_nothing_temporary_stays(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert CheckpointReader(path).manifest.progress == Progress(step=12, samples=24, tokens=96)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000012"]


def test_a_leftover_of_a_killed_save_is_no_checkpoint_and_does_not_disturb_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / ".step-00000005.partial"
    leftover.mkdir(parents=True)
    (leftover / "shard-00000.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    save(tmp_path, 5)
    assert torch.equal(resolve_checkpoint(tmp_path).weight("w"), VALUES.view(6, 10))


def test_a_failing_write_leaves_no_final_name(tmp_path: Path) -> None:
    def broken() -> Iterator[Fragment]:
        yield from fragments([7])
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save_checkpoint(
            tmp_path,
            World(),
            broken(),
            {"w": [60]},
            progress=Progress(),
            config={},
            data_fingerprint="",
            tokenizer_sha256="",
        )
    assert list_checkpoints(tmp_path) == []


def test_every_flipped_byte_is_found_and_the_older_checkpoint_is_used(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    shard = newest / "shard-00000.safetensors"
    content = shard.read_bytes()
    for position in range(0, len(content), 37):
        shard.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        reader, problems = newest_valid(tmp_path)
        assert reader is not None
        assert reader.directory.name == "step-00000001"
        assert "shard-00000.safetensors" in problems["step-00000002"]
    shard.write_bytes(content)
    assert resolve_checkpoint(tmp_path).directory == newest


@pytest.mark.parametrize("damage", ["truncate", "empty", "remove", "other"])
def test_a_broken_manifest_is_passed_over(damage: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / "manifest.json"
    text = manifest.read_text()
    if damage == "remove":
        manifest.unlink()
    else:
        manifest.write_text({"truncate": text[:-30], "empty": "", "other": '{"format": "x"}'}[damage])
    assert resolve_checkpoint(tmp_path).directory.name == "step-00000001"


def test_a_manifest_cannot_name_files_outside_its_directory(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    record = json.loads((path / "manifest.json").read_text())
    record["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}
    del record["sha256"]
    record["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="outside its directory"):
        CheckpointReader(path)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    newest = [save(tmp_path, step) for step in (1, 2, 3, 4)][-1]
    assert prune_checkpoints(tmp_path, newest, 2) == ["step-00000001", "step-00000002"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_the_checkpoint_just_saved_outlives_broken_ones_with_higher_numbers(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        save(tmp_path, step)
    for step in (8, 12):
        (tmp_path / f"checkpoints/step-{step:08d}/shard-00000.safetensors").write_bytes(b"broken")
    assert resolve_checkpoint(tmp_path).manifest.progress.step == 4
    assert prune_checkpoints(tmp_path, save(tmp_path, 7), 2) == []
    assert resolve_checkpoint(tmp_path).manifest.progress.step == 7
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-00000004", "step-00000007", "superseded-step-00000008", "superseded-step-00000012"}


def test_a_manifest_that_was_changed_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"samples": 4', '"samples": 5'))
    reader, problems = newest_valid(tmp_path)
    assert reader is not None
    assert reader.manifest.progress.step == 1
    assert "was changed after it was written" in problems["step-00000002"]


def test_a_run_without_a_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train it first"):
        resolve_checkpoint(tmp_path)
