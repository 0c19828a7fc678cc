"""Saving behind the training: it writes the state at the save, tiers feed each other, and a failure costs no step."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.world import World
from monitoring.runlog import RunLog
from pipeline.checkpoints.health import Health
from pipeline.checkpoints.manifest import WEIGHT, CheckpointManifest, checkpoints_in, list_checkpoints
from pipeline.checkpoints.node_directory import NodeTierConfig
from pipeline.checkpoints.proof import compare
from pipeline.checkpoints.reader import CheckpointReader, resolve_checkpoint
from pipeline.checkpoints.restart import History, find_checkpoint
from pipeline.checkpoints.saver import CheckpointConfig, Saver
from pipeline.checkpoints.transfer import Outcome, Transfer
from pipeline.engine import Fragment
from pipeline.errors import CheckpointError, ConfigError
from pipeline.rollback import Rollback
from tests.pipeline.saved_checkpoint import draft

RUN_ID = "0123456789abcdef"


class Run:
    """A run of one rank whose state is its step."""

    def __init__(self, root: Path, attempt: int = 1, **config: Any) -> None:
        self.attempt, self.answer = attempt, 1.0
        self.run_dir = root / "run"
        self.run_dir.mkdir(exist_ok=True)
        self.config = CheckpointConfig(keep_healthy=0, keep_best=0, **config)
        self.state = torch.zeros(1000)
        self.events: list[dict[str, Any]] = []
        self.saver = Saver(self.config, World(), self.run_dir, RUN_ID, self.fragments, self.event)

    def fragments(self) -> Iterator[Fragment]:
        yield Fragment(parameter="w", start=0, weight=self.state, optimizer_state={"exp_avg": -self.state})

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})

    def draft(self) -> CheckpointManifest:
        step = int(self.state[0])
        proof = {"losses": {"1": self.answer}, "precision": "fp32"}
        return draft(step, shapes={"w": [1000]}, run=RUN_ID, attempt=self.attempt, proof=proof)

    def step(self) -> int:
        """Change the state, then do what the training does after a step."""
        self.state += 1
        if self.saver.wanted(int(self.state[0])):
            self.saver.advance(self.saver.reports())
            self.saver.save(int(self.state[0]), self.draft)
        return int(self.state[0])

    def rest(self) -> None:
        """Let the threads have their time."""
        for _ in range(8):  # writing and completing, in three tiers
            time.sleep(0.02)
            self.saver.advance(self.saver.reports())
        assert not self.saver.under_way

    def found(self, history: History | None = None) -> int:
        found = find_checkpoint(self.config, World(), self.run_dir, RUN_ID, history or History())
        assert found.manifest is not None
        return found.manifest.progress.step


def holds(path: Path, step: int) -> bool:
    reader = CheckpointReader(path)
    weight, average = (reader.slice("w", kind, 0, 1000) for kind in (WEIGHT, "exp_avg"))
    return reader.manifest.progress.step == step and bool((weight == step).all() and (average == -step).all())


def test_what_is_written_is_the_state_at_the_save_though_the_training_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, every=3)
    for _ in range(12):
        run.step()
        if run.saver.under_way:
            run.state += 0.25  # as soon as the save has returned
            run.state -= 0.25
    run.rest()
    for path in list_checkpoints(run.run_dir):
        assert holds(path, CheckpointReader(path).manifest.progress.step), path


def test_a_save_that_is_due_while_another_runs_is_done_after_it(tmp_path: Path) -> None:
    run = Run(tmp_path, every=2, keep_last=9)
    run.step()
    run.step()
    # The thread may be done, but nobody has heard of it yet.
    run.state += 2
    run.saver.save(4, run.draft)
    run.state += 2
    run.saver.save(6, run.draft)
    skipped = [event for event in run.events if event["kind"] == "checkpoint_skipped"]
    assert [(event["step"], event["tier"]) for event in skipped] == [(6, "shared")]
    run.rest()
    run.state += 1
    run.saver.save(7, run.draft)
    run.rest()
    assert [path.name[-2:] for path in list_checkpoints(run.run_dir)] == ["02", "07"]


def test_tiers_feed_each_other_and_keep_what_they_are_told(tmp_path: Path) -> None:
    for name in ("memory", "local"):
        (tmp_path / name).mkdir()
    run = Run(
        tmp_path,
        every=4,
        keep_last=2,
        memory=NodeTierConfig(every=1, keep=2, directory=str(tmp_path / "memory")),
        local=NodeTierConfig(every=2, keep=1, directory=str(tmp_path / "local")),
    )
    for _ in range(9):
        run.step()
        run.rest()

    def steps(directory: Path) -> list[int]:
        found = checkpoints_in(directory)
        assert all(holds(path, int(path.name[-8:])) for path in found)
        return [int(path.name[-8:]) for path in found]

    node = next((tmp_path / "memory").glob("rookery-*/*/*/"))
    assert steps(node) == [8, 9]
    assert steps(next((tmp_path / "local").glob("rookery-*/*/*/"))) == [8]
    assert steps(run.run_dir / "checkpoints") == [4, 8]
    saved = [(event["tier"], event["step"]) for event in run.events if event["kind"] == "checkpoint"]
    assert saved == [("local", 2), ("local", 4), ("shared", 4), ("local", 6), ("local", 8), ("shared", 8)]
    assert run.found() == 9
    # A copy in memory that rots is passed over for the newest that is intact, wherever that is.
    shard = node / "step-00000009/shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert run.found() == 8
    run.saver.discard_node_tiers()
    assert not list((tmp_path / "memory").glob("rookery-*/*"))
    assert run.found() == 8


def test_what_the_run_has_gone_back_behind_is_not_taken_from_a_node(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    memory = NodeTierConfig(every=1, directory=str(tmp_path / "memory"))
    run = Run(tmp_path, every=4, memory=memory)
    for _ in range(7):
        run.step()
        run.rest()
    assert run.found() == 7
    assert run.found(History(attempts=2, starts=[(1, 0), (2, 7)])) == 7
    # On other nodes, from step 4 on, and killed before it could save.
    assert run.found(History(attempts=2, starts=[(1, 0), (2, 4)])) == 4
    # Rolled back, and killed before what came after it was put away, on the shared file system too.
    back = Rollback(from_step=7, to_step=4, branch=1, samples_from=4, samples_to=9)
    assert run.found(History(attempts=1, rollbacks=[back])) == 4
    run.step()
    run.rest()
    assert [path.name[-1] for path in list_checkpoints(run.run_dir)] == ["4", "8"]
    assert run.found() == 8
    assert run.found(History(attempts=1, rollbacks=[back])) == 4
    run.saver.go_back_to(4, promoted=False)
    assert run.found() == 4


def test_the_interval_can_be_shortened_for_a_while(tmp_path: Path) -> None:
    run = Run(tmp_path, every=4, keep_last=9)
    run.saver.shorten(2, until=6)
    for _ in range(12):
        run.step()
        run.rest()
    assert [int(path.name[-2:]) for path in list_checkpoints(run.run_dir)] == [2, 4, 6, 8, 12]


def test_a_fast_tier_that_fails_does_not_keep_the_slow_ones_from_being_served(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    run = Run(tmp_path, every=4, memory=NodeTierConfig(every=4, directory=str(tmp_path / "memory")))
    node = next((tmp_path / "memory").glob("rookery-*/*/*/"))
    shutil.rmtree(node)
    node.write_text("in the way")
    for _ in range(10):
        run.step()
        run.rest()
    assert [path.name[-2:] for path in list_checkpoints(run.run_dir)] == ["05", "09"]
    assert {event["tier"] for event in run.events if event["kind"] == "checkpoint_failed"} == {"memory"}


def test_a_state_that_gives_no_sound_answer_is_not_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, every=1)
    run.step()
    run.rest()
    run.answer = math.nan
    run.step()
    problem = run.saver.save_last(run.draft)
    assert problem is not None
    assert "losses on the probe batch are nan" in problem
    assert run.found() == 1


def test_the_source_of_a_copy_stays_until_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").mkdir()
    run = Run(
        tmp_path,
        every=3,
        keep_last=20,
        memory=NodeTierConfig(every=1, keep=1, directory=str(tmp_path / "memory")),
    )
    whole = Transfer.open

    def slow(self: Transfer, *arguments: Any) -> Outcome | None:  # as where thousands of ranks meet
        time.sleep(0.02)
        return whole(self, *arguments)

    monkeypatch.setattr(Transfer, "open", slow)
    for _ in range(30):
        run.step()
        time.sleep(0.005)
    run.saver.settle()
    assert not [event for event in run.events if event["kind"] == "checkpoint_failed"]
    assert list_checkpoints(run.run_dir)


def test_a_save_that_fails_is_told_and_the_next_one_works(tmp_path: Path) -> None:
    run = Run(tmp_path, every=1)
    run.step()
    run.rest()
    aside = run.run_dir / "checkpoints"
    aside.rename(run.run_dir / "aside")
    aside.write_text("in the way")  # also of root
    run.step()
    run.rest()
    problem = run.saver.save_last(run.draft)
    assert problem is not None
    assert "rank 0 on " in problem
    failed = [event for event in run.events if event["kind"] == "checkpoint_failed"]
    assert [(event["step"], event["rank"], event["tier"]) for event in failed] == [(2, 0, "shared")] * 2
    aside.unlink()
    (run.run_dir / "aside").rename(aside)
    assert resolve_checkpoint(run.run_dir).manifest.progress.step == 1
    run.step()
    run.rest()
    assert resolve_checkpoint(run.run_dir).manifest.progress.step == 3


def test_a_proof_that_does_not_hold_is_refused() -> None:
    saved = {"losses": {"1": 2.0, "8": 1.5}, "precision": "fp32"}
    near = {"losses": {"1": 2.001, "8": 1.5}, "precision": "fp32"}
    far = {"losses": {"1": 2.0, "8": 1.51}, "precision": "fp32"}
    assert compare(saved, near, None) == {"1": [2.0, 2.001], "8": [1.5, 1.5]}
    with pytest.raises(CheckpointError, match=r"loss 1\.510000 at depth 8, but 1\.500000 when"):
        compare(saved, far, None)
    assert compare(saved, {**far, "precision": "bf16"}, None)  # where 16 bits are the less exact
    assert compare(saved, far, 0.1)
    with pytest.raises(CheckpointError):
        compare(saved, {"losses": {"1": float("nan"), "8": 1.5}, "precision": "fp32"}, None)
    assert compare({}, far, None) == {}


def test_a_log_tells_where_launches_went_on_from_and_how_long_a_save_takes(tmp_path: Path) -> None:
    assert History.read(tmp_path / "run") == History()
    for step, seconds in ((0, 2.5), (4, 3.5)):
        log = RunLog.open(tmp_path / "run")
        log.event("start", step=step)
        log.event("checkpoint", tier="shared", step=step + 4, path=f"step-{step + 4}", seconds=seconds)
        log.event("checkpoint", tier="local", step=step + 5, path=f"step-{step + 5}", seconds=0.1)
        log.close()
    history = History.read(tmp_path / "run")
    assert history.starts == [(1, 0), (2, 4)]
    assert (history.attempts, history.saved, history.save_seconds) == (2, ["step-4", "step-8"], 3.5)


def test_health_is_whether_the_state_settles_along_the_loop() -> None:
    verdicts = {}
    for name, (rate, last) in {"settles": (0.7, 0.2), "grows": (1.3, 0.2), "rounding": (1.3, 1e-7)}.items():
        health = Health()
        assert health.vector() == {}
        health.note({"step": 1, "loss": 2.0, "grad_norm": 1.0})
        assert health.vector()["verdict"] == "unknown"
        series = {"state_rms": [1.0] * 16, "relative_residual": [0.5] * 15 + [last], "contraction": rate}
        health.note({"step": 2, "loss": 2.0, "grad_norm": 1.0, **series})
        health.note({"step": 3, "loss": 2.0, "grad_norm": 1.0})
        verdicts[name] = health.vector()["verdict"]
        assert health.vector(["dead_core"])["verdict"] == "suspect"
        health.note({"step": 4, "loss": float("inf"), "grad_norm": 1.0})
        assert health.vector()["verdict"] == "suspect"
    assert verdicts == {"settles": "healthy", "grows": "suspect", "rounding": "healthy"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"every": 0}, "checkpoint.every: 0"),
        ({"keep_last": 1}, "checkpoint.keep_last: 1"),
        ({"proof_tolerance": -1.0}, "checkpoint.proof_tolerance: -1.0"),
        ({"local": NodeTierConfig(every=5)}, "checkpoint.local.directory"),
        ({"memory": NodeTierConfig(every=0, directory="/dev/shm")}, "checkpoint.memory.every: 0"),
    ],
)
def test_values_without_a_meaning_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CheckpointConfig(**config)
