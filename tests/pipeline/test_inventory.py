"""`rookery checkpoints list`, `verify`, `prune` and `convert`: what they say, and what they never remove."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from data_prep.world import World
from monitoring.runlog import RunLogError
from pipeline.checkpoints.inventory import describe_checkpoints, prune_run, verify_checkpoints
from pipeline.checkpoints.manifest import CheckpointManifest, Progress, checkpoint_name
from pipeline.engine import Fragment
from pipeline.errors import CheckpointError, ConfigError
from rookery.checkpoints import app
from tests.pipeline.saved_checkpoint import save_checkpoint
from tests.ranks import rookery

RULES = "checkpoint: {keep_last: 2, keep_every: null, keep_best: 1, keep_healthy: 2, healthy_horizon: 3}\n"
SHARD = "shard-00000.safetensors"


@pytest.fixture
def run(workdir: Path) -> Path:
    """A run of eight checkpoints: those up to the fifth are healthy, the third has the lowest validation loss."""
    directory = workdir / "run"
    (directory / "tokenizer").mkdir(parents=True)
    text = (workdir / "test.yaml").read_text()
    (directory / "run.yaml").write_text(text[: text.index("checkpoint:")] + RULES)
    for step in range(1, 9):
        draft = CheckpointManifest(
            progress=Progress(step=step, samples=step, tokens=1000 * step),
            config={},
            data_fingerprint="data",
            tokenizer_sha256="tokenizer",
            shapes={"w": [6]},
            health={"verdict": "healthy" if step <= 5 else "suspect"},
            validation={"step": step, "loss": {"1": 9.0, "16": 2.0 + abs(step - 3)}},
        )
        weight = torch.full((6,), float(step))
        fragment = Fragment(parameter="w", start=0, weight=weight, optimizer_state={"exp_avg": -weight})
        save_checkpoint(directory, World(), [fragment], draft)
    return directory


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def invoke(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_listing_says_what_each_is_and_why_it_is_kept(run: Path) -> None:
    (run / "checkpoints/step-00000001/manifest.json").write_text("{}")
    found = {entry["name"]: entry for entry in invoke("list", run)["checkpoints"]}
    assert list(found) == [checkpoint_name(step) for step in range(1, 9)]
    assert "damaged" in found["step-00000001"]["problem"]
    assert {entry["step"]: entry["kept"] for entry in found.values() if "step" in entry} == {
        2: ["healthy"],
        3: ["best"],
        4: ["healthy"],
        5: [],
        6: [],
        7: ["last"],
        8: ["last"],
    }
    eighth = found["step-00000008"]
    assert eighth["tokens"] == 8000
    assert eighth["bytes"] == (run / "checkpoints/step-00000008" / SHARD).stat().st_size
    assert (eighth["files"], eighth["ranks"], eighth["optimizer_state"]) == (1, 1, ["exp_avg"])
    assert (eighth["verdict"], eighth["validation_loss"], eighth["problem"]) == ("suspect", 7.0, None)
    assert "ok" not in invoke("list", run)  # which is for `verify` to say
    single = invoke("list", run / "checkpoints/step-00000003")["checkpoints"]
    assert [(entry["step"], entry["kept"]) for entry in single] == [(3, None)]
    text = CliRunner().invoke(app, ["list", str(run)]).stdout
    assert "step-00000004: 4,000 tokens" in text
    assert "health healthy, validation loss 3.0000, kept as healthy" in text


def test_a_verification_names_every_bad_file(run: Path) -> None:
    assert all(entry["problem"] is None for entry in verify_checkpoints(run))
    seen: list[tuple[int, int]] = []
    flip(run / "checkpoints/step-00000002" / SHARD)
    (run / "checkpoints/step-00000004" / SHARD).unlink()
    (run / "checkpoints/step-00000006/manifest.json").write_text("{}")
    found = verify_checkpoints(run, progress=lambda done, total: seen.append((done, total)))
    broken = {entry["name"]: entry for entry in found if entry["problem"]}
    assert list(broken) == ["step-00000002", "step-00000004", "step-00000006"]
    assert broken["step-00000002"]["bad_files"] == broken["step-00000004"]["bad_files"] == [SHARD]
    assert "missing" in broken["step-00000004"]["problem"]
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == sum(entry.get("bytes", 0) for entry in found)
    assert not any(entry["problem"] for entry in describe_checkpoints(run) if entry["name"] != "step-00000006")


def test_verify_ends_with_12_if_something_is_broken(run: Path) -> None:
    flip(run / "checkpoints/step-00000002" / SHARD)
    done = rookery("checkpoints", "verify", "run", "--json", cwd=run.parent)
    assert done.returncode == 12
    verified = json.loads(done.stdout)
    assert not verified["ok"]
    assert [entry["bad_files"] for entry in verified["checkpoints"] if entry["problem"]] == [[SHARD]]
    with pytest.raises(CheckpointError, match="nowhere: no such run or checkpoint"):
        describe_checkpoints(run.parent / "nowhere")


def test_a_run_that_has_saved_nothing_yet_is_called_just_that(workdir: Path) -> None:
    run = workdir / "run"
    run.mkdir()
    (run / "run.yaml").write_text((workdir / "test.yaml").read_text())
    for command in (describe_checkpoints, verify_checkpoints, lambda path: prune_run(path, {})):
        with pytest.raises(CheckpointError, match="run: the run has no checkpoint on the shared file system yet"):
            command(run)


def test_pruning_applies_the_rules_of_the_run_or_those_that_are_given(run: Path) -> None:
    planned = invoke("prune", run, "--dry-run")
    assert planned["removed"] == [checkpoint_name(step) for step in (1, 5, 6)]
    assert steps(run) == list(range(1, 9))
    done = invoke("prune", run)
    assert done == planned | {"dry_run": False}
    assert steps(run) == [2, 3, 4, 7, 8]
    assert list(done["kept"].values()) == [["healthy"], ["best"], ["healthy"], ["last"], ["last"]]
    invoke("prune", run, "--keep-last", 3, "--keep-healthy", 0, "--keep-best", 0)
    assert steps(run) == [4, 7, 8]
    with pytest.raises(ConfigError, match=r"--keep-last 1: checkpoint\.keep_last: 1 .*at least 2"):
        prune_run(run, {"keep_last": 1})
    assert steps(run) == [4, 7, 8]


def test_pruning_keeps_the_newest_intact_one_and_what_is_broken(run: Path) -> None:
    for step in (6, 7, 8):
        flip(run / f"checkpoints/step-{step:08d}" / SHARD)
    (run / "checkpoints/step-00000001/manifest.json").write_text("{}")
    done = prune_run(run, {"keep_last": 2, "keep_best": 0, "keep_healthy": 0})
    assert list(done["kept"]) == ["step-00000004", "step-00000005"]
    assert list(done["broken"]) == [checkpoint_name(step) for step in (8, 7, 6, 1)]
    assert steps(run) == [1, 4, 5, 6, 7, 8]
    for step in (4, 5):
        flip(run / f"checkpoints/step-{step:08d}" / SHARD)
    with pytest.raises(CheckpointError, match="none of its checkpoints is intact, and none is removed"):
        prune_run(run, {})
    assert steps(run) == [1, 4, 5, 6, 7, 8]


def test_pruning_is_refused_while_a_job_is_at_work_on_the_run(run: Path) -> None:
    (run / "events.jsonl").touch()
    (run / "attempts").mkdir()
    job = os.open(run / "events.jsonl", os.O_RDWR)
    fcntl.flock(job, fcntl.LOCK_EX)
    with pytest.raises(RunLogError, match="another job is at work"):
        prune_run(run, {})
    assert steps(run) == list(range(1, 9))
    assert prune_run(run, {}, dry_run=True)["removed"]
    os.close(job)
    assert prune_run(run, {})["removed"]
    assert not (run / "attempts/0001").exists()


def test_pruning_takes_checkpoints_of_other_users_if_told_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (run / "checkpoints").rglob("*"):
        if path.stat().st_uid == 0:  # root's files are trusted
            os.chown(path, 4243, -1)
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(CheckpointError, match=r"belongs to another user .*--other-owners"):
        prune_run(run, {})
    assert invoke("prune", run, "--other-owners")["removed"] == [checkpoint_name(step) for step in (1, 5, 6)]


def test_a_conversion_prints_what_it_wrote(run: Path) -> None:
    done = invoke("convert", run, run.parent / "out", "--shards", 2)
    assert (done["step"], done["files"], done["optimizer_state"]) == (8, 2, ["exp_avg"])
    assert [entry["kept"] for entry in describe_checkpoints(run.parent / "out")] == [None]
    text = CliRunner().invoke(app, ["convert", str(run), str(run.parent / "light"), "--without-optimizer"]).stdout
    assert "step 8 in 1 file(s)" in text
    assert "weights alone" in text
