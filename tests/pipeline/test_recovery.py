"""What a run does about steps that go wrong: it leaves them out, does them again, goes back, and goes on by itself."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from monitoring.runlog import read_attempt, read_events
from slurm.local import rank_command, rank_environment
from tests.pipeline.broken_gradients import BROKEN, RUNS
from tests.ranks import forked_python

ROOT = Path(__file__).parents[2]
STEPS = 12


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of `tests.pipeline.broken_gradients`."""
    workdir = tmp_path_factory.mktemp("broken")
    for name in ("tokenizer", "data", "test.yaml"):
        (workdir / name).symlink_to(corpus / name)
    environment = {**rank_environment(2), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        rank_command(2, [*forked_python(), "-m", "tests.pipeline.broken_gradients", "test.yaml"]),
        cwd=workdir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return workdir


def _events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir) if event["kind"] == kind]


def _decisive(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(record["step"], record["loss"], record["grad_norm"], record["sample_hash"]) for record in records]


def test_every_run_finishes_by_itself(runs: Path) -> None:
    for fault, stage in RUNS:
        assert (runs / f"{fault}-{stage}" / "code").read_text() == "0 all steps done"


def test_a_transient_error_is_repeated_away_and_the_node_named(runs: Path) -> None:
    run = runs / "transient-1"
    (replay,) = _events(run, "replay")
    named = [{"rank": BROKEN, "host": socket.gethostname()}]
    assert (replay["step"], replay["verdict"], replay["ranks"]) == (6, "transient", named)
    (suspected,) = _events(run, "suspected_hardware")
    assert (suspected["rank"], suspected["host"]) == (BROKEN, socket.gethostname())
    assert not _events(run, "skip")
    # The repetition is as good as the step: the run is the clean one, bit by bit.
    assert _decisive(read_attempt(run, 1)) == _decisive(read_attempt(runs / "clean-1", 1))
    assert not _events(runs / "clean-1", "replay")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_whose_gradient_is_none_on_one_rank_is_skipped_on_all(runs: Path, stage: int) -> None:
    run, records = runs / f"always-{stage}", read_attempt(runs / f"always-{stage}", 1)
    assert [record["step"] for record in records if record.get("skipped")] == [6]
    (skip,) = _events(run, "skip")
    assert (skip["step"], skip["detector"]) == (6, "non_finite")
    assert [event["verdict"] for event in _events(run, "replay")] == ["deterministic"]
    assert not _events(run, "suspected_hardware")
    # The same weights as before on every rank: what follows is finite, and the same at every stage.
    reference = read_attempt(runs / "always-1", 1)
    for record, other in zip(records, reference, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_three_in_twenty_go_back_behind_them_and_past_their_data(runs: Path) -> None:
    run, records = runs / "thrice-1", read_attempt(runs / "thrice-1", 1)
    assert [event["step"] for event in _events(run, "skip")] == [6, 7, 8]
    (rollback,) = _events(run, "rollback")
    assert (rollback["to_step"], rollback["branch"], rollback["samples_from"]) == (4, 1, 32)
    assert rollback["from_step"] in (8, 9)
    assert rollback["samples_to"] > 8 * rollback["from_step"]
    again = [record for record in records if record["branch"] == 1]
    assert [record["step"] for record in again] == list(range(5, STEPS + 1))
    assert again[0]["samples"] == rollback["samples_to"] + 8
    assert rollback["adjustments"] == []  # the data are to blame, the first time
    assert sorted(path.name for path in (run / "checkpoints").glob("superseded-*")) == ["superseded-step-00000008"]
