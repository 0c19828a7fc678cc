"""Under a real srun, over two nodes: training with the MPI that belongs to it, meeting without any, the wrong one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from monitoring.runlog import read_metrics
from tests.pipeline.conftest import write_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small dataset and the configuration test.yaml that trains on it."""
    return write_corpus(tmp_path_factory.mktemp("srun"))


TRAINING = ["-m", "rookery", "train", "test.yaml", "train.steps=1", "train.micro_batch_size=1"]


def srun(workdir: Path, slurm: dict[str, str], mpi: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the arguments `command` on two ranks of each of two nodes."""
    return subprocess.run(
        ["srun", "--nodes=2", "--ntasks-per-node=2", f"--mpi={mpi}", sys.executable, *command],
        cwd=workdir,
        env={**slurm, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_four_ranks_on_two_nodes_train(workdir: Path, slurm: dict[str, str]) -> None:
    done = srun(workdir, slurm, "pmi2", *TRAINING)
    assert done.returncode == 0, done.stderr
    environment = json.loads((workdir / "run/attempts/0001/environment.json").read_text())
    assert [rank["host"] for rank in environment["node_check"]] == ["n1", "n1", "n2", "n2"]
    assert len(list(read_metrics(workdir / "run"))) == 1


def test_four_ranks_on_two_nodes_meet_without_mpi(workdir: Path, slurm: dict[str, str]) -> None:
    program = (
        "import os; from data_prep.world import World; from pipeline.gloo_control import connect;"
        "world = World.discover(connect);"
        "print(world.gather((world.rank, os.environ['SLURMD_NODENAME'])) or '', end='')"
    )
    done = srun(workdir, {**slurm, "ROOKERY_CONTROL": "torch"}, "none", "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == str([(0, "n1"), (1, "n1"), (2, "n2"), (3, "n2")])


def test_a_wrong_mpi_plugin_is_refused(workdir: Path, slurm: dict[str, str]) -> None:
    done = srun(workdir, slurm, "none", *TRAINING, "run_dir=wrong")
    assert done.returncode == 12, done.stderr
    assert "the launcher started 4 ranks but MPI sees 1" in done.stderr
    assert "ROOKERY_CONTROL=torch" in done.stderr
    assert not (workdir / "wrong").exists()
