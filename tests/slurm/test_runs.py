"""Whole runs on a real SLURM cluster: submitted, cut short by limits and faults, and finished by themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from monitoring.crashes.report import read_crash_report
from monitoring.runlog import Record, attempts, read_events, read_outcome
from pipeline.checkpoints.manifest import list_checkpoints
from slurm.joblog import read
from slurm.quarantine import quarantined
from tests.monitoring.plain_branches import branches
from tests.pipeline.conftest import write_corpus
from tests.ranks import rookery
from tests.slurm.cluster import Cluster, write_profile

ROOT = Path(__file__).parents[2]
STEPS = 180
PACE = 0.3  # seconds a step: no chain of links of a minute does it in two
EVERY = 10

LONGER = [f"train.steps={STEPS}", "schedule.cooldown_steps=0", f"checkpoint.every={EVERY}", "monitor.probe_every=100"]
SIGNALLED = [*LONGER, "control.stop_margin_seconds=0"]


class Workplace:
    """A cluster, a directory with data, and the command line in it."""

    def __init__(self, root: Path, cluster: Cluster) -> None:
        self.root, self.cluster = root, cluster
        self.environment = {
            "SLURM_CONF": cluster.environment["SLURM_CONF"],
            "PATH": cluster.environment["PATH"],
            "XDG_CONFIG_HOME": str(root / "config"),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/slurm/pace'}",
            "OMP_NUM_THREADS": "1",
        }

    def rookery(self, *arguments: str, pace: float = 0.0) -> subprocess.CompletedProcess[str]:
        return rookery(*arguments, cwd=self.root, environment={**self.environment, "TEST_SECONDS_PER_STEP": str(pace)})

    def submit(self, run: str, *arguments: str, pace: float = 0.0) -> list[str]:
        """Submit a run of two nodes; return the ids of its jobs."""
        wanted = ("--site", "test", "--nodes", "2", "--json", *arguments, f"run_dir={run}")
        done = self.rookery("submit", "test.yaml", *wanted, pace=pace)
        assert done.returncode == 0, done.stderr
        jobs: list[str] = json.loads(done.stdout)["jobs"]
        return jobs

    def over(self, run: str) -> Record | None:
        """How the chain of a run has ended, if it has."""
        records = read(self.root / run) if (self.root / run).exists() else []
        return next((record for record in records if record["kind"] == "over"), None)

    def wait_until_over(self, run: str, seconds: float = 200.0) -> Record:
        self.wait(lambda: self.over(run) is not None, f"the end of {run}", seconds)
        found = self.over(run)
        assert found is not None
        return found

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [f"{path}: {path.read_text()[-1500:]}" for path in sorted(self.root.rglob("*.log"))[-12:]]
                logs += [f"{path}: {path.read_text()}" for path in self.root.rglob("jobs.jsonl")]
                queue = self.cluster.sh("squeue", "--all", check=False)
                raise AssertionError("\n".join([f"waited {seconds:g} s for {what}", queue, *logs]))
            time.sleep(0.1)

    def newest(self, run: str) -> int:
        """Step of the newest checkpoint, 0 if there is none."""
        return max((int(path.name.removeprefix("step-")) for path in list_checkpoints(self.root / run)), default=0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a user's profile of the cluster."""
    root = write_corpus(tmp_path_factory.mktemp("runs"))
    write_profile(root / "config")
    return root


@pytest.fixture(scope="module")
def chains(root: Path, running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """Two runs that need three links of a minute each; they go on while the other tests run, on another cluster."""
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=4) as cluster:
        place = Workplace(root, cluster)
        limits = ("--time", "1m", "--signal-lead", "20", "--budget", "20m", "--sbatch", "exclusive=")
        place.submit("requeued", *limits, "--chain", "requeue", *SIGNALLED, pace=PACE)
        place.submit("chained", *limits, "--chain", "afterany", *SIGNALLED, pace=PACE)
        yield place


@pytest.fixture
def place(root: Path, chains: Workplace, cluster: Cluster) -> Workplace:
    return Workplace(root, cluster)


@pytest.fixture(scope="module")
def uninterrupted(root: Path, chains: Workplace) -> list[Record]:
    """Step records of the same run, started by hand and never interrupted."""
    done = rookery("train", "test.yaml", "run_dir=uninterrupted", *LONGER, cwd=root, ranks=2)
    assert done.returncode == 0, done.stderr
    return figures(root / "uninterrupted")


def figures(run_dir: Path) -> list[dict[str, Any]]:
    names = ("step", "loss", "grad_norm", "lr", "num_steps", "samples", "tokens", "sample_hash")
    return [{name: record[name] for name in names} for record in branches(run_dir).current]


def starts(run_dir: Path) -> list[int]:
    return [event["step"] for event in read_events(run_dir) if event["kind"] == "start"]


def test_a_submitted_run_finishes_with_the_losses_of_mpiexec(place: Workplace) -> None:
    jobs = place.submit("short", "--time", "10m")
    done = rookery("train", "test.yaml", "run_dir=by-hand", cwd=place.root, ranks=2)
    assert done.returncode == 0, done.stderr
    assert place.wait_until_over("short")["code"] == 0
    assert figures(place.root / "short") == figures(place.root / "by-hand")
    assert len(figures(place.root / "short")) == 12
    place.wait(lambda: "COMPLETED" in place.cluster.sh("scontrol", "show", "job", jobs[0]), "the job to end", 10)
    again = place.rookery("submit", "test.yaml", "--site", "test", "--nodes", "2", "run_dir=short")
    assert again.returncode == 12
    assert "is finished, at step 12 of train.steps = 12; give more" in again.stderr
    environment = json.loads((place.root / "short/attempts/0001/environment.json").read_text())
    assert [rank["host"] for rank in environment["node_check"]] == ["n1", "n2"]


def test_whatever_hits_it_a_run_completes_by_itself(place: Workplace, uninterrupted: list[Record]) -> None:
    run, cluster = place.root / "hit", place.cluster
    limits = ("--chain", "afterany", "--time", "10m", "--budget", "80m", "--partition", "low")
    jobs = place.submit("hit", *limits, *LONGER, pace=0.05)
    saved: list[int] = []

    def get_going(attempt: int) -> str:
        """Wait until an attempt has made a checkpoint of its own; return its job."""
        place.wait(lambda: run.exists() and attempt in attempts(run), f"attempt {attempt}", 90)
        own = {"kind": "checkpoint", "attempt": attempt}
        place.wait(
            lambda: any(own.items() <= event.items() for event in read_events(run)), f"a checkpoint of {own}", 90
        )
        return str([record for record in read(run) if record["kind"] == "launched"][-1]["job"])

    assert get_going(1) == jobs[0]
    rank = json.loads((run / "attempts/0001/environment.json").read_text())["ranks"][1]
    os.kill(rank["pid"], signal.SIGKILL)
    saved.append(place.newest("hit"))

    assert get_going(2) == jobs[1]
    cluster.sh("scancel", jobs[1])
    saved.append(place.newest("hit"))

    assert get_going(3) == jobs[2]
    cluster.sh("scancel", "--signal=TERM", jobs[2])
    place.wait(lambda: read_outcome(run, 3), "the outcome of the run that was told to stop")
    outcome = read_outcome(run, 3)
    assert outcome is not None
    assert outcome["exit_code"] == 10, outcome
    assert "SIGTERM" in outcome["reason"]
    saved.append(outcome["step"])

    assert get_going(4) == jobs[3]
    urgent = ("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.sh("sbatch", *urgent)
    saved.append(place.newest("hit"))

    assert get_going(5) == jobs[4]
    victim = [record for record in read(run) if record["kind"] == "launched"][-1]["nodes"][1]
    cluster.kill_node(victim)
    saved.append(place.newest("hit"))
    place.wait(lambda: len(attempts(run)) == 6, "the attempt on other nodes", 90)
    cluster.revive(victim)

    assert place.wait_until_over("hit")["code"] == 0
    assert figures(run) == uninterrupted
    assert all(start >= step for start, step in zip(starts(run)[1:], saved, strict=True)), (starts(run), saved)
    assert list(quarantined(run, 1.0, time.time())) == [victim]
    launched = [record for record in read(run) if record["kind"] == "launched"]
    assert victim not in launched[-1]["nodes"]
    crashes = {attempt: read_crash_report(run, attempt) or {} for attempt in attempts(run)}
    said = {attempt: (crash["class"], crash["host"]) for attempt, crash in crashes.items() if crash}
    assert said[1] == ("killed", "n2")
    assert (crashes[1]["kind"], crashes[1]["rank"]) == ("SIGKILL", 1)
    assert {rank: last["step"] > 0 for rank, last in crashes[1]["last_steps"].items()} == {"0": True, "1": True}
    assert said[5] == ("node lost", victim)
    assert not said.keys() & {3, 6}


def test_a_diverging_run_and_one_whose_input_is_bad_end_their_chains_at_once(place: Workplace) -> None:
    limits = ("--chain", "afterany", "--time", "10m", "--budget", "30m")
    jobs = place.submit("diverging", *limits, "optimizer.learning_rate=1.0e+30")
    (place.root / "data/gone").symlink_to(place.root / "data/train")
    jobs += place.submit("refused", *limits, "--sbatch", "begin=now+2", "data.train=data/gone")
    (place.root / "data/gone").unlink()  # between submission and start
    diverged, refused = place.wait_until_over("diverging"), place.wait_until_over("refused")
    assert diverged["code"] == 11
    assert "start again with a lower optimizer.learning_rate" in diverged["reason"]
    assert refused["code"] == 12
    assert "data/gone" in refused["reason"]
    place.wait(lambda: not place.cluster.sh("squeue", "--noheader", f"--jobs={','.join(jobs)}"), "the queue", 20)


@pytest.mark.parametrize("run", ["requeued", "chained"])
def test_a_run_longer_than_its_limit_goes_on_link_by_link(
    chains: Workplace, uninterrupted: list[Record], run: str
) -> None:
    assert chains.wait_until_over(run, 280)["code"] == 0
    run_dir = chains.root / run
    assert figures(run_dir) == uninterrupted
    outcomes = [read_outcome(run_dir, attempt) or {} for attempt in attempts(run_dir)]
    assert len(outcomes) >= 3
    assert {outcome["exit_code"] for outcome in outcomes[:-1]} == {10}
    assert all("SIGUSR2" in outcome["reason"] for outcome in outcomes[:-1]), outcomes
    assert starts(run_dir)[1:] == [outcome["step"] for outcome in outcomes[:-1]]
    jobs = {record["job"] for record in read(run_dir) if record["kind"] == "launched"}
    assert len(jobs) == (1 if run == "requeued" else len(outcomes))
