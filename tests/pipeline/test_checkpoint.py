"""Checkpoints: whole or absent, checked when read, any slice from any pieces, nothing outside their directory."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.world import World
from pipeline.checkpoints.convert import write_checkpoint
from pipeline.checkpoints.manifest import (
    WEIGHT,
    CheckpointManifest,
    Progress,
    check_file,
    encode_manifest,
    list_checkpoints,
)
from pipeline.checkpoints.reader import CheckpointReader, newest_valid, resolve_checkpoint
from pipeline.checkpoints.shard import Piece
from pipeline.engine import Fragment
from pipeline.errors import CheckpointError
from tests.pipeline.saved_checkpoint import save_checkpoint

VALUES = torch.arange(60, dtype=torch.float32)


def fragments(cuts: list[int]) -> Iterator[Fragment]:
    edges = [0, *cuts, 60]
    for start, end in pairwise(edges):
        yield Fragment(
            parameter="w", start=start, weight=VALUES[start:end], optimizer_state={"exp_avg": -VALUES[start:end]}
        )


def save(run_dir: Path, step: int, cuts: list[int] | None = None) -> Path:
    return save_checkpoint(run_dir, World(), fragments(cuts or [7, 31]), draft(step))


def draft(step: int) -> CheckpointManifest:
    return CheckpointManifest(
        progress=Progress(step=step, samples=step * 2, tokens=step * 8),
        config={"seed": 1},
        data_fingerprint="data",
        tokenizer_sha256="tokenizer",
        shapes={"w": [6, 10]},
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
        save_checkpoint(tmp_path, World(), broken(), draft(1))
    assert list_checkpoints(tmp_path) == []


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


@pytest.mark.parametrize("where", ["files", "fragments"])
@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", ".hidden", "", "sub/file"])
def test_a_manifest_cannot_name_files_outside_its_directory(where: str, name: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = CheckpointReader(path).manifest
    if where == "files":
        manifest.files[name] = {"bytes": 1, "xxh3_128": "0"}
    else:
        manifest.fragments["w"].append((name, 0, 1))
    (path / "manifest.json").write_bytes(encode_manifest(manifest))
    with pytest.raises(CheckpointError, match="outside its directory"):
        CheckpointReader(path)


def test_pieces_must_lie_in_files_with_a_checksum(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = CheckpointReader(path).manifest
    manifest.fragments["w"].append(("other.safetensors", 0, 1))
    (path / "manifest.json").write_bytes(encode_manifest(manifest))
    with pytest.raises(CheckpointError, match="no checksum"):
        CheckpointReader(path)


def test_links_and_files_of_other_owners_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    shard = path / "shard-00000.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not a plain file"):
        CheckpointReader(path)
    shard.unlink()
    (tmp_path / "elsewhere").rename(shard)
    if os.getuid() == 0:  # nobody else can give a file away
        os.chown(shard, 12345, -1)
        with pytest.raises(CheckpointError, match=r"belongs to another user \(uid 12345\)"):
            CheckpointReader(path)
        assert torch.equal(CheckpointReader(path, other_owners=True).weight("w"), VALUES.view(6, 10))


def test_a_manifest_that_was_changed_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"samples":4', '"samples":5'))
    reader, problems = newest_valid(tmp_path)
    assert reader is not None
    assert reader.manifest.progress.step == 1
    assert "was damaged or changed" in problems["step-00000002"]


def test_what_has_no_checkpoint_says_what_it_is_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such run or checkpoint"):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither a run with a checkpoint nor a checkpoint"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "run.yaml").touch()
    with pytest.raises(CheckpointError, match=r"no checkpoint on the shared file system yet; start it again: `rookery"):
        resolve_checkpoint(tmp_path)


def test_a_checkpoint_of_more_files_than_may_be_open_is_checked_and_read(tmp_path: Path) -> None:
    layout: list[list[Piece]] = [[("w", start, 1)] for start in range(60)]
    path = write_checkpoint(
        tmp_path, draft(1), layout, {"w": [WEIGHT]}, lambda parameter, kind, start, numel: VALUES[start : start + numel]
    )
    before, taken = resource.getrlimit(resource.RLIMIT_NOFILE), set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    free = [number for number in range(1000) if str(number) not in taken]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[20], before[1]))
        reader = CheckpointReader(path)
        for _ in range(2):
            assert torch.equal(reader.weight("w"), VALUES.view(6, 10))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("exchanged_for", ["file", "link", "pipe"])
def test_a_file_that_is_exchanged_between_the_look_at_its_owner_and_the_reading_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanged_for: str
) -> None:
    path = save(tmp_path, 1)
    copy = Path(shutil.copyfile(path / "shard-00000.safetensors", tmp_path / "copy"))

    def look_and_be_late(path: Path, *, is_directory: bool = False, other_owners: bool) -> os.stat_result:
        status = check_file(path, is_directory=is_directory, other_owners=other_owners)
        if not path.name.startswith("shard-"):
            return status
        if exchanged_for == "file":
            copy.replace(path)
        else:
            path.unlink()
            os.mkfifo(path) if exchanged_for == "pipe" else path.symlink_to(copy)
        return status

    monkeypatch.setattr("pipeline.checkpoints.manifest.check_file", look_and_be_late)
    with pytest.raises(CheckpointError, match=r"exchanged|Too many levels"):
        CheckpointReader(path)


def test_a_checkpoint_that_is_in_the_way_of_a_new_one_is_set_aside_and_never_removed(tmp_path: Path) -> None:
    for generation in range(3):
        path = save(tmp_path, 5)
        (path / "which").write_text(str(generation))
    which = {each.name: (each / "which").read_text() for each in (tmp_path / "checkpoints").iterdir()}
    assert which == {
        "superseded-step-00000005": "0",
        "superseded-step-00000005-2": "1",
        "step-00000005": "2",
    }
