"""Training with every scope, curricula and a batch ramp: the world is a detail, resume is exact."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from monitoring.runlog import Record, read_events, read_metrics
from slurm.local import find_mpiexec, rank_environment
from tests.ranks import forked_python, rookery

EXACT = ("loss", "grad_norm", "lr", "num_steps", "depths", "samples", "tokens")
RAMPS = (
    "depth.recurrence_ramp={kind: sqrt, start: 2, steps: 8}",
    "depth.backprop_ramp={kind: piecewise, start: 1, points: [{step: 5, value: 2}]}",
    "schedule={kind: cosine, warmup_steps: 2, batch_start: 8, batch_increment: 8, batch_ramp_steps: 7}",
    "train.global_batch_size=24",
)


def train(workdir: Path, *overrides: str, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    return rookery("train", "test.yaml", *overrides, cwd=workdir, ranks=ranks)


@pytest.mark.parametrize(("scope", "stage"), [("balanced", 2), ("per_sequence", 3)])
def test_the_curve_of_every_scope_does_not_depend_on_the_world(workdir: Path, scope: str, stage: int) -> None:
    overrides = [f"depth.scope={scope}", "train.steps=9", f"zero.stage={stage}", "checkpoint.keep_last=4", *RAMPS]
    assert (done := train(workdir, *overrides, "run_dir=one")).returncode == 0, done.stderr
    assert (done := train(workdir, *overrides, "run_dir=two", ranks=2)).returncode == 0, done.stderr
    one, two = read_metrics(workdir / "one"), read_metrics(workdir / "two")
    assert [record["samples"] for record in one] == [8, 16, 24, 32, 48, 64, 80, 104, 128]
    for name in ("loss", "grad_norm"):
        assert [record[name] for record in one] == pytest.approx([record[name] for record in two], rel=1e-4)
    for name in ("lr", "num_steps", "depths", "samples", "tokens"):
        assert [record.get(name) for record in one] == [record.get(name) for record in two]
    assert sum(one[-1]["depths"].values()) == (24 // 2 if scope == "balanced" else 24)
    assert len(one[-1]["depths"]) > 1
    if scope == "balanced":
        replays_exactly(workdir, two, overrides)


def replays_exactly(workdir: Path, before: list[Record], overrides: list[str]) -> None:
    """Do the last steps of `two` once more, from a checkpoint in the middle of all ramps."""
    for newer in ("step-00000008", "step-00000009"):
        (workdir / "two/checkpoints" / newer).rename(workdir / newer)
    assert (done := train(workdir, *overrides, "run_dir=two", ranks=2)).returncode == 0, done.stderr
    assert [event["step"] for event in read_events(workdir / "two") if event["kind"] == "start"] == [0, 4]
    after = read_metrics(workdir / "two")
    for name in EXACT:
        assert [record.get(name) for record in after] == [record.get(name) for record in before]


def test_ranks_that_would_draw_different_depths_are_refused(workdir: Path) -> None:
    rank = [*forked_python(), "-m", "rookery", "train", "test.yaml"]
    command = [find_mpiexec(), "-n", "1", *rank, ":", "-n", "1", *rank, "depth.sigma=0.4"]
    done = subprocess.run(
        command, cwd=workdir, env=rank_environment(2), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 12, done.stderr
    assert "depth: 1 of 2 ranks, the first of them 1, would take other steps than rank 0" in done.stderr
    assert not (workdir / "run").exists()


def test_a_document_mask_and_objective_options_train(workdir: Path) -> None:
    options = ("train.document_mask=true", "objective={z_loss: 1.0e-4, goldfish: 4, label_smoothing: 0.05}")
    for run_dir, ranks in (("one", None), ("two", 2)):
        done = train(workdir, *options, "train.steps=4", f"run_dir={run_dir}", ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = read_metrics(workdir / "one"), read_metrics(workdir / "two")
    assert [record["tokens"] for record in one] == [record["tokens"] for record in two]
    assert one[-1]["tokens"] < 4 * 8 * 32 * 0.85
    assert [record["loss"] for record in one] == pytest.approx([record["loss"] for record in two], rel=1e-4)
