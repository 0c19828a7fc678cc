"""Training that is killed again and again, anywhere: no run is lost, and none goes on from a wrong state."""

from __future__ import annotations

import math
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from monitoring.runlog import read_events, read_metrics, replayed
from pipeline.checkpoints.manifest import WEIGHT, checkpoints_in
from pipeline.checkpoints.reader import CheckpointReader, resolve_checkpoint
from tests.faults.fork_server import ForkServer, fault_server
from tests.faults.interpose import Action, Fault

RANKS = 2
# Operations of each rank in the run directory from the start of a launch to its end, and seconds, in round numbers.
OPERATIONS = (100, 12)
SECONDS = 1.2
EXACT = ("loss", "grad_norm", "lr", "num_steps", "samples", "tokens", "sample_hash")
OVERRIDES = ("checkpoint.every=2", "train.steps=8")
KILLS_OF_A_RUN = 5


@pytest.fixture(scope="module")
def server() -> ForkServer:
    return fault_server()


def new_workdir(corpus: Path, place: Path) -> Path:
    place.mkdir()
    for name in ("tokenizer", "data", "test.yaml"):
        (place / name).symlink_to(corpus / name)
    return place


@pytest.fixture(scope="module")
def uninterrupted(server: ForkServer, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nobody disturbed."""
    workdir = new_workdir(corpus, tmp_path_factory.mktemp("whole") / "workdir")
    assert server.train(workdir, "test.yaml", *OVERRIDES) == [0] * RANKS
    return workdir / "run"


@dataclass(frozen=True)
class Kill:
    """How a launch is killed: all ranks after some seconds, or one at an operation, upon which the other follows."""

    seconds: float | None = None
    rank: int = 0
    action: Action | None = None
    operation: int = 0

    @classmethod
    def draw(cls, random: Random) -> Kill:
        if random.random() < 0.3:
            return cls(seconds=random.uniform(0.1, SECONDS))
        rank = random.randrange(RANKS)
        action = random.choice([Action.KILL_BEFORE, Action.KILL_WITHIN])
        return cls(rank=rank, action=action, operation=random.randint(1, OPERATIONS[rank]))

    def launch(self, server: ForkServer, workdir: Path, *overrides: str) -> list[int]:
        """Start the run and kill it; return the ranks' exit codes."""
        faults = {}
        if self.action is not None:
            watched = f"{workdir}/@(run|memory)*"
            faults = {self.rank: Fault(pattern=watched, action=self.action, first=self.operation)}
        return server.train(workdir, *overrides, ranks=RANKS, faults=faults, kill_after=self.seconds)


def newest_step(workdir: Path) -> int:
    """Return the step of the newest checkpoint of a run, in its directory or its node's memory; all must be intact."""
    directories = (workdir / "run/checkpoints", *(workdir / "memory").glob("*/*/*"))
    found = [path for directory in directories for path in checkpoints_in(directory)]
    return max((CheckpointReader(path).manifest.progress.step for path in found), default=0)


def train_through(server: ForkServer, workdir: Path, seed: int) -> int:
    """Launch a run until it has finished and kill all launches but the last; return how many were killed.

    What every launch starts from is compared with what was there when all ranks of the one before were dead.
    """
    random, run_dir, kills = Random(seed), workdir / "run", list[Kill]()
    overrides = ["test.yaml", *OVERRIDES]
    if seed % 2:
        overrides.append(f"checkpoint.memory={{every: 1, directory: {workdir}/memory, replicate: false}}")
        (workdir / "memory").mkdir()
    while True:
        expected, kill = newest_step(workdir), Kill.draw(random) if len(kills) < KILLS_OF_A_RUN else Kill()
        known = len(read_events(run_dir)) if run_dir.exists() else 0
        codes = kill.launch(server, workdir, *overrides)
        events = read_events(run_dir)[known:] if run_dir.exists() else []
        started = [event["step"] for event in events if event["kind"] == "start"]
        assert started in ([], [expected]), (seed, kills, kill)
        saved = [event["step"] for event in events if event["kind"] == "checkpoint"]
        assert newest_step(workdir) >= max(saved, default=expected), (seed, kills, kill)
        if codes == [0] * RANKS:
            # Who is killed behind the last commit leaves a finished run, which nobody touches again.
            assert not started or not list((run_dir / "checkpoints").glob(".*")), (seed, kills)
            return len(kills)
        assert -signal.SIGKILL in codes, (seed, kills, kill, codes)
        kills.append(kill)


def check_same(run_dir: Path, reference: Path) -> None:
    """Check that a run has every bit of one that nobody disturbed, also where it did a step again."""
    assert all(exact(older) == exact(newer) for older, newer in replayed(run_dir))
    assert [exact(record) for record in read_metrics(run_dir)] == [exact(record) for record in read_metrics(reference)]
    ours, theirs = resolve_checkpoint(run_dir), resolve_checkpoint(reference)
    assert ours.manifest.progress == theirs.manifest.progress
    for name, shape in theirs.manifest.shapes.items():
        for kind in (WEIGHT, *theirs.manifest.optimizer_state):
            whole = (name, kind, 0, math.prod(shape))
            assert torch.equal(ours.slice(*whole), theirs.slice(*whole)), (name, kind)


def exact(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in EXACT}


def kill_many(kills: int, server: ForkServer, corpus: Path, reference: Path, tmp_path: Path) -> None:
    done, seed = 0, 0
    while done < kills:
        seed += 1
        workdir = new_workdir(corpus, tmp_path / f"seed-{seed}")
        done += train_through(server, workdir, seed)
        check_same(workdir / "run", reference)
        shutil.rmtree(workdir)


def test_training_killed_20_times_loses_nothing_and_changes_nothing(
    server: ForkServer, corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    kill_many(20, server, corpus, uninterrupted, tmp_path)


@pytest.mark.soak
def test_training_killed_200_times_loses_nothing_and_changes_nothing(
    server: ForkServer, corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    kill_many(200, server, corpus, uninterrupted, tmp_path)
