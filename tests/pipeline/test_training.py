"""Training on real ranks: resume is exact, the world size is a detail, faults and bad input end as promised."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from monitoring.crashes.report import read_crash_report
from monitoring.runlog import read_attempt, read_events, read_metrics, read_outcome, replayed
from pipeline.checkpoints.manifest import encode_manifest, list_checkpoints
from pipeline.checkpoints.reader import CheckpointReader, resolve_checkpoint
from pipeline.export import export_checkpoint
from slurm.local import rank_command, rank_environment
from tests.pipeline.expected_samples import expected_hashes
from tests.ranks import forked_python, rookery

EXACT = ("loss", "grad_norm", "lr", "num_steps", "samples", "tokens", "sample_hash")


def train(workdir: Path, *overrides: str, ranks: int | None = 2) -> subprocess.CompletedProcess[str]:
    return rookery("train", "test.yaml", *overrides, cwd=workdir, ranks=ranks)


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir)]


def sample_hashes(run_dir: Path) -> list[str]:
    return [record["sample_hash"] for record in read_metrics(run_dir)]


def start_training(workdir: Path, *overrides: str, local_world_size: int = 2) -> subprocess.Popen[bytes]:
    command = rank_command(2, [*forked_python(), "-m", "rookery", "train", "test.yaml", *overrides])
    environment = rank_environment(2) | {"LOCAL_WORLD_SIZE": str(local_world_size)}
    return subprocess.Popen(command, cwd=workdir, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_step(run_dir: Path, step: int, attempt: int = 1) -> list[dict[str, Any]]:
    """Wait until the attempt has logged `step`; return what is known of its ranks."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if run_dir.is_dir() and any(record["step"] >= step for record in read_attempt(run_dir, attempt)):
            environment = json.loads((run_dir / f"attempts/{attempt:04d}/environment.json").read_text())
            ranks: list[dict[str, Any]] = environment["ranks"]
            return ranks
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never reached")


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of 12 steps on two ranks without any fault."""
    root = tmp_path_factory.mktemp("uninterrupted")
    for name in ("tokenizer", "data", "test.yaml"):
        (root / name).symlink_to(corpus / name)
    done = train(root)
    assert done.returncode == 0, done.stderr
    return root / "run"


def test_a_run_leaves_the_documented_directory(uninterrupted: Path) -> None:
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"run.yaml", "attempts", "metrics", "events.jsonl", "checkpoints", "tokenizer"} <= names
    records = read_metrics(uninterrupted)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["samples"] == 12 * 8
    assert records[-1]["tokens"] == 12 * 8 * 32
    # Each of the first 96 samples once, eight a step.
    assert [record["sample_hash"] for record in records] == expected_hashes(
        [range(8 * t, 8 * t + 8) for t in range(12)]
    )
    assert records[-1]["loss"] < records[0]["loss"]
    probed = records[3]
    assert len(probed["state_rms"]) == len(probed["relative_residual"]) == sum(probed["num_steps"])
    assert [path.name for path in list_checkpoints(uninterrupted)] == ["step-00000008", "step-00000012"]
    assert read_outcome(uninterrupted, 1)["exit_code"] == 0  # type: ignore[index]


def test_training_leaves_nothing_in_shared_memory(uninterrupted: Path) -> None:
    assert not list(Path("/dev/shm").glob("deepspeed_*"))


def test_a_finished_run_is_left_alone(uninterrupted: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in uninterrupted.rglob("*"))
    done = train(uninterrupted.parent, ranks=None)
    assert done.returncode == 0, done.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in uninterrupted.rglob("*")) == before


def test_a_rank_killed_and_a_job_stopped_lose_nothing_and_change_nothing(workdir: Path) -> None:
    longer, run_dir, memory = ("train.steps=40",), workdir / "run", workdir / "memory"
    memory.mkdir()
    assert (done := train(workdir, *longer, "run_dir=whole")).returncode == 0, done.stderr
    in_memory = (f"checkpoint.memory.directory={memory}", "checkpoint.memory.every=1", "checkpoint.every=1000")
    killed = start_training(workdir, *longer, *in_memory, local_world_size=1)
    ranks = wait_for_step(run_dir, 13)
    os.kill(ranks[1]["pid"], signal.SIGKILL)
    assert killed.wait(60) != 0
    assert read_outcome(run_dir, 1) is None
    reached = read_metrics(run_dir)[-1]["step"]
    assert read_crash_report(run_dir, 1) is None
    first, _ = (node for run in memory.glob("rookery-*/*") for node in sorted(run.glob("*/")))
    shutil.rmtree(first)  # this node is lost, with what it held; the other holds copies
    stopped = start_training(workdir, *longer, *in_memory, local_world_size=1)
    os.kill(wait_for_step(run_dir, reached + 9, attempt=2)[1]["pid"], signal.SIGTERM)  # one rank; all must agree
    assert stopped.wait(60) == 10
    outcome = read_outcome(run_dir, 2)
    assert outcome is not None
    assert outcome["exit_code"] == 10
    crash = read_crash_report(run_dir, 1)  # written by the next start, for nobody was left
    assert crash is not None
    assert (crash["class"], crash["last_step"]) == ("killed", reached)
    assert all(0 <= crash["last_steps"][rank]["step"] <= reached + 1 for rank in ("0", "1"))
    saved = CheckpointReader(list_checkpoints(run_dir)[-1]).manifest.progress.step
    assert saved == outcome["step"] < 40
    done = train(workdir, *longer)
    assert done.returncode == 0, done.stderr
    started = [(event["step"], event["tiers"]) for event in read_events(run_dir) if event["kind"] == "start"]
    assert started[::2] == [(0, []), (saved, ["shared"])]
    assert started[1][1] == ["memory"]
    assert 0 < started[1][0] <= reached
    assert replayed(run_dir)
    for older, newer in replayed(run_dir):
        assert {name: older[name] for name in EXACT} == {name: newer[name] for name in EXACT}
    for record, reference in zip(read_metrics(run_dir), read_metrics(workdir / "whole"), strict=True):
        assert {name: record[name] for name in EXACT} == {name: reference[name] for name in EXACT}
    ours, theirs = resolve_checkpoint(run_dir), resolve_checkpoint(workdir / "whole")
    for name, shape in ours.manifest.shapes.items():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            numel = math.prod(shape)
            assert torch.equal(ours.slice(name, kind, 0, numel), theirs.slice(name, kind, 0, numel)), (name, kind)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (None, ["zero.stage=0", "train.micro_batch_size=8"]),
        (2, ["zero.stage=3", "train.activation_checkpointing=selective"]),
        (4, ["zero.stage=2", "zero.scope=node", "train.activation_checkpointing=block"]),
    ],
)
def test_ranks_nodes_stages_and_micro_batches_do_not_change_the_curve(
    uninterrupted: Path, workdir: Path, ranks: int | None, overrides: list[str]
) -> None:
    nodes = {"LOCAL_WORLD_SIZE": "2"}  # of two ranks each
    done = rookery("train", "test.yaml", *overrides, cwd=workdir, ranks=ranks, environment=nodes if ranks else None)
    assert done.returncode == 0, done.stderr
    assert losses(workdir / "run") == pytest.approx(losses(uninterrupted), rel=1e-5)
    assert sample_hashes(workdir / "run") == sample_hashes(uninterrupted)


def test_a_run_goes_on_with_other_ranks_in_other_stages_again_and_again(workdir: Path) -> None:
    # The schedule is a function of the whole run's length: hold it still while the run grows in parts.
    held = ("schedule.cooldown_steps=0", "train.global_batch_size=12", "train.micro_batch_size=1")
    for steps, ranks, stage in ((3, 2, 1), (5, 4, 3), (7, None, 1), (9, 3, 3), (12, 2, 2)):
        done = train(workdir, *held, f"train.steps={steps}", f"zero.stage={stage}", ranks=ranks)
        assert done.returncode == 0, done.stderr
    whole = train(workdir, *held, "run_dir=whole", ranks=None)
    assert whole.returncode == 0, whole.stderr
    assert losses(workdir / "run") == pytest.approx(losses(workdir / "whole"), rel=1e-5)
    assert sample_hashes(workdir / "run") == sample_hashes(workdir / "whole")
    proofs = [event["proof"] for event in read_events(workdir / "run") if event["kind"] == "loaded"]
    assert [list(proof) for proof in proofs] == [["1", "4"]] * 4
    for then, now in (pair for proof in proofs for pair in proof.values()):
        assert now == pytest.approx(then, rel=1e-6)


def test_bf16_trains_and_resumes_exactly(workdir: Path) -> None:
    held = ("train.precision=bf16", "schedule.cooldown_steps=0")  # no cooldown: a schedule that both lengths share
    assert train(workdir, *held, "run_dir=whole").returncode == 0
    assert losses(workdir / "whole")[-1] < losses(workdir / "whole")[0]
    for steps in (4, 12):
        done = train(workdir, *held, f"train.steps={steps}")
        assert done.returncode == 0, done.stderr
    assert losses(workdir / "run") == losses(workdir / "whole")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(uninterrupted: Path, workdir: Path) -> None:
    assert train(workdir, "train.steps=8", "schedule.cooldown_steps=0", ranks=None).returncode == 0
    shard = workdir / "run/checkpoints/step-00000008/shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert train(workdir, "train.steps=9", "schedule.cooldown_steps=0", ranks=None).returncode == 0
    start = [event for event in read_events(workdir / "run") if event["kind"] == "start"][-1]
    assert start["step"] == 4
    assert "shard-00000.safetensors" in start["passed_over"]["step-00000008"]
    # A checkpoint whose bytes are right, but which is not the model that it says it is.
    newest = list_checkpoints(workdir / "run")[-1]
    manifest = CheckpointReader(newest).manifest
    manifest.proof["losses"]["4"] += 0.1
    (newest / "manifest.json").write_bytes(encode_manifest(manifest))
    done = train(workdir, "train.steps=10", "schedule.cooldown_steps=0", ranks=None)
    assert done.returncode == 1
    assert "the probe batch has loss" in done.stderr
    # A file system that is not there must not be taken for a run that has not begun.
    newest.parent.rename(workdir / "run/elsewhere")
    done = train(workdir, "train.steps=10", "schedule.cooldown_steps=0", ranks=None)
    assert done.returncode == 12
    assert "has saved step-00000009, but there is no checkpoint any more" in done.stderr


def test_a_second_job_on_the_same_run_is_refused(workdir: Path) -> None:
    first = start_training(workdir, "train.steps=4000", "checkpoint.every=4000")
    wait_for_step(workdir / "run", 1)
    second = train(workdir, "train.steps=4000", ranks=None)
    assert second.returncode == 12
    assert "another job is at work on" in second.stderr
    first.terminate()
    assert first.wait(60) == 10
    assert [path.name for path in (workdir / "run/attempts").iterdir()] == ["0001"]


def test_a_row_that_breaks_in_mid_run_is_a_failure_with_the_rank_s_own_report(workdir: Path, corpus: Path) -> None:
    (workdir / "data").unlink()
    shutil.copytree(corpus / "data", workdir / "data")
    for shard in (workdir / "data/train").rglob("c.0.0"):
        content = bytearray(shard.read_bytes())
        content[66 :: 2 * 70] = bytes(len(content[66 :: 2 * 70]))  # the checksum of every other row
        shard.write_bytes(content)
    done = train(workdir)
    assert done.returncode not in (0, 10, 11, 12, 13)
    reports = list((workdir / "run/attempts/0001").glob("failure-*.json"))
    assert reports
    assert "checksum" in "".join(json.loads(reports[0].read_text())["error"])
    outcome = read_outcome(workdir / "run", 1)
    assert outcome is not None
    assert "checksum" in outcome["reason"]


def test_a_diverging_run_ends_with_11_and_says_what_to_do(workdir: Path) -> None:
    done = train(
        workdir, "optimizer.learning_rate=1e30", "optimizer.gradient_clipping=0", "checkpoint.every=100", ranks=None
    )
    assert done.returncode == 11, done.stderr
    outcome = read_outcome(workdir / "run", 1)
    assert outcome is not None
    assert "optimizer.learning_rate" in outcome["reason"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=3"], "train.stepz: unknown key (did you mean 'train.steps'?)"),
        (["train.steps=many"], "train.steps: Value 'many'"),
        (["data.train=nowhere"], "data.train: "),
        (["model.vocab_size=300"], "model.vocab_size: 300 is smaller than the 512 tokens"),
        (["model.block_size=16"], "model.block_size = 16"),
        (["train.global_batch_size=7"], "train.global_batch_size: 7 is not a multiple of 2 ranks"),
        (["train.precision=bf16", "zero.stage=0"], "zero.stage: 0"),
        (["train.attention=flash"], "train.attention: "),
        (["run_dir=data"], "data holds something that is not a run"),
    ],
)
def test_bad_input_is_one_message_exit_12_and_nothing_written(
    workdir: Path, overrides: list[str], message: str
) -> None:
    done = train(workdir, *overrides, ranks=2 if "ranks" in message else None)
    assert done.returncode == 12
    assert message in done.stderr
    assert done.stderr.count("rookery: ") == 1
    assert "Traceback" not in done.stderr
    assert not (workdir / "run").exists()


def test_a_broken_manifest_is_refused(workdir: Path, corpus: Path) -> None:
    (workdir / "broken").mkdir()
    (workdir / "broken/manifest.json").write_bytes((corpus / "data/train/manifest.json").read_bytes()[:-40])
    done = train(workdir, "data.train=broken", ranks=None)
    assert done.returncode == 12
    assert "broken/manifest.json" in done.stderr
    assert not (workdir / "run").exists()


def test_resuming_with_another_shape_seed_or_dataset_is_refused(uninterrupted: Path) -> None:
    root = uninterrupted.parent
    before = sorted(path for path in uninterrupted.rglob("*"))
    for override in ("model.n_embd=64", "seed=7", "optimizer.kind=muon", "data.train=data/validation"):
        done = train(root, "train.steps=20", override, ranks=None)
        assert done.returncode == 12, override
        assert override.split("=")[0] in done.stderr
    assert sorted(path for path in uninterrupted.rglob("*")) == before


def test_a_new_run_begins_from_the_weights_of_an_export(uninterrupted: Path, workdir: Path) -> None:
    export_checkpoint(uninterrupted, workdir / "export")
    overrides = ("run_dir=tuned", "schedule.cooldown_steps=0", "init_from.path=export")
    assert (done := train(workdir, *overrides, "train.steps=4")).returncode == 0, done.stderr
    assert losses(workdir / "tuned")[0] < losses(uninterrupted)[0] - 0.1
    assert [event["not_in_it"] for event in read_events(workdir / "tuned") if event["kind"] == "init_from"] == [[]]
    shutil.rmtree(workdir / "export")  # a run that resumes has its own weights
    assert (done := train(workdir, *overrides, "train.steps=5", ranks=None)).returncode == 0, done.stderr
