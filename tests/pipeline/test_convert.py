"""The same checkpoint as other files: bit by bit the same tensors, the same identity, nothing half-written."""

from __future__ import annotations

import dataclasses
import math
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.world import World
from pipeline.checkpoints.convert import convert_checkpoint, cut, stored_kinds
from pipeline.checkpoints.manifest import WEIGHT, CheckpointManifest, Progress
from pipeline.checkpoints.reader import CheckpointReader, newest_valid, resolve_checkpoint
from pipeline.engine import Fragment
from pipeline.errors import CheckpointError, ConfigError
from tests.pipeline.saved_checkpoint import save_checkpoint

SHAPES = {"a": [6, 10], "b": [7], "c": [3, 11]}
STATES = {"a": ["momentum"], "b": ["exp_avg", "exp_avg_sq"], "c": ["exp_avg", "exp_avg_sq"]}  # as Muon beside AdamW


def fragments() -> list[Fragment]:
    """Pieces of random tensors, cut in odd places; among the values are a nan and both zeros."""
    noise = torch.Generator().manual_seed(1)
    found = []
    for name, shape in SHAPES.items():
        numel = math.prod(shape)
        values = {kind: torch.randn(numel, generator=noise) for kind in (WEIGHT, *STATES[name])}
        values[WEIGHT][:3] = torch.tensor([math.nan, -0.0, 0.0])
        for start, end in pairwise([0, numel // 3, numel // 2, numel]):
            pieces = {kind: value[start:end] for kind, value in values.items()}
            found.append(Fragment(parameter=name, start=start, weight=pieces.pop(WEIGHT), optimizer_state=dict(pieces)))
    return found


def save(run_dir: Path, step: int = 12) -> CheckpointReader:
    (run_dir / "tokenizer").mkdir(parents=True, exist_ok=True)
    (run_dir / "tokenizer/tokenizer.json").write_text("{}")
    draft = CheckpointManifest(
        progress=Progress(step=step, samples=2 * step, tokens=8 * step, sample_hash="abc"),
        config={"seed": 1},
        data_fingerprint="data",
        tokenizer_sha256="tokenizer",
        shapes=SHAPES,
        run="1234",
        loss_scale={"scale": 8.0},
        health={"verdict": "healthy"},
        validation={"step": 10, "loss": {"4": 2.0}},
        proof={"losses": {"1": 3.0}, "precision": "fp32"},
    )
    return CheckpointReader(save_checkpoint(run_dir, World(), fragments(), draft))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32)


def assert_same(one: CheckpointReader, other: CheckpointReader, states: dict[str, list[str]]) -> None:
    for name, shape in SHAPES.items():
        for kind in (WEIGHT, *states.get(name, [])):
            ours, theirs = (reader.slice(name, kind, 0, math.prod(shape)) for reader in (one, other))
            assert torch.equal(bits(ours), bits(theirs)), (name, kind)


@contextmanager
def quota(numel: int) -> Iterator[None]:
    """Files may have so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (numel, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_converted_goes_back_into_its_run_as_if_it_had_never_left(tmp_path: Path, shards: int) -> None:
    saved = save(tmp_path / "run")
    done = convert_checkpoint(tmp_path / "run", tmp_path / "out", shards=shards)
    converted = resolve_checkpoint(tmp_path / "out")
    assert done["files"] == len(converted.manifest.files) == shards
    assert done["optimizer_state"] == ["exp_avg", "exp_avg_sq", "momentum"]
    assert str(converted.directory) == done["checkpoint"]
    assert_same(saved, converted, STATES)
    kept = {item.name for item in dataclasses.fields(CheckpointManifest)} - {"files", "fragments"}
    for name in kept:
        assert getattr(saved.manifest, name) == getattr(converted.manifest, name), name
    assert (tmp_path / "out/tokenizer/tokenizer.json").read_text() == "{}"
    shutil.rmtree(saved.directory)
    converted.directory.rename(saved.directory)
    found, problems = newest_valid(tmp_path / "run")
    assert found is not None
    assert problems == {}
    assert_same(found, CheckpointReader(saved.directory), STATES)


def test_the_weights_alone_are_a_third_of_it_and_no_more_than_weights(tmp_path: Path) -> None:
    saved = save(tmp_path / "run")
    done = convert_checkpoint(saved.directory, tmp_path / "out", shards=2, with_optimizer=False)
    converted = resolve_checkpoint(tmp_path / "out")
    assert_same(saved, converted, {})
    assert converted.manifest.optimizer_state == done["optimizer_state"] == []
    assert converted.manifest.loss_scale == {}
    assert set(map(tuple, stored_kinds(converted).values())) == {(WEIGHT,)}
    with pytest.raises(CheckpointError, match="exp_avg"):
        converted.slice("b", "exp_avg", 0, 7)


@given(
    shapes=st.dictionaries(st.text("abc", min_size=1, max_size=2), st.lists(st.integers(1, 7), max_size=3), min_size=1),
    shards=st.integers(1, 9),
)
def test_a_cut_covers_every_element_once_in_files_of_equal_size(shapes: dict[str, list[int]], shards: int) -> None:
    files = cut(shapes, shards)
    covered = sorted(
        (name, element) for pieces in files for name, start, numel in pieces for element in range(start, start + numel)
    )
    assert covered == sorted((name, element) for name, shape in shapes.items() for element in range(math.prod(shape)))
    sizes = [sum(numel for *_, numel in pieces) for pieces in files]
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= 1
    assert len(files) == min(shards, sum(sizes))


def test_what_cannot_be_converted_leaves_nothing(tmp_path: Path) -> None:
    saved = save(tmp_path / "run")
    for shards in (0, 1_000_000):
        with pytest.raises(ConfigError, match=f"--shards {shards}"):
            convert_checkpoint(saved.directory, tmp_path / "out", shards=shards)
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match=r"already exists .*name another directory"):
        convert_checkpoint(saved.directory, tmp_path / "taken")
    with quota(100), pytest.raises(DataError, match=r"/out: cannot be written \(File too large\); make room or name"):
        convert_checkpoint(saved.directory, tmp_path / "out")
    shard = next(saved.directory.glob("shard-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=shard.name):
        convert_checkpoint(saved.directory, tmp_path / "out")
    shard.write_bytes(content)
    shutil.rmtree(tmp_path / "run/tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer: missing"):
        convert_checkpoint(saved.directory, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "taken"]
