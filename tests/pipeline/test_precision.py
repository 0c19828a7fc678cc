"""fp16 scales the loss; a step whose gradient overflows changes nothing but the scale, and a resume is bitwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.checkpoints.reader import resolve_checkpoint
from tests.pipeline.sharded_training import STEPS, SUITES
from tests.pipeline.test_sharded_optimizers import alone, launch, record_of, same_bits


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("fp16")
    launch("fp16", 2, 1, path)
    return path


@pytest.mark.parametrize("name", [case.name for case in SUITES["fp16"] if case.resumes is None])
def test_training_goes_on_at_a_smaller_scale_after_gradients_have_overflowed(out: Path, name: str) -> None:
    record = record_of(out, name)
    skipped = [step for step in range(STEPS) if record["skipped"][step]]
    assert skipped == [5, 11]  # whose loss is 20 times as large
    # DeepSpeed forgives the first overflow.
    assert [record["scales"][step] for step in (0, 5, 11)] == [65536.0, 65536.0, 32768.0]
    kind = "muon" if name.startswith("muon") else "adamw"
    losses = alone(kind)[0]
    assert record["losses"][:5] == pytest.approx(losses[:5], rel=2e-3)
    assert max(abs(ours - losses[0]) for ours in record["losses"][-2:]) > 0.05  # it has learned


@pytest.mark.parametrize("name", ["fp16-1", "muon-fp16"])
def test_a_resume_goes_on_with_scale_and_step_counts_bit_for_bit(out: Path, name: str) -> None:
    straight, resumed = record_of(out, name), record_of(out, f"{name}-resumed")
    half = STEPS // 2
    assert any(straight["skipped"][:half])  # or the optimizer's steps would be those of the run
    for key in ("losses", "scales", "skipped"):
        assert resumed[key] == straight[key][half:], key
    assert same_bits(resolve_checkpoint(out / name), resolve_checkpoint(out / f"{name}-resumed"))
