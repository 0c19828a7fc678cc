"""Builds as arrays of tasks: Submitit's jobs on a real SLURM cluster, and on this machine."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from data_prep.files import file_sha256
from tests.ranks import rookery

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and the dataset that a plain build makes of the standard library's json and email packages."""
    directory = tmp_path_factory.mktemp("array")
    library = Path(sysconfig.get_path("stdlib"))
    (directory / "corpus").mkdir()
    for name in ("json", "email"):
        (directory / "corpus" / name).symlink_to(library / name)
    inputs = ("--input", "corpus/json", "corpus/email")
    for command in (
        ("data", "train-tokenizer", *inputs, "--vocab-size", "600", "--out", "tokenizer"),
        ("data", "build", *inputs, *BUILD, "--out", "plain"),
    ):
        done = rookery(*command, cwd=directory)
        assert done.returncode == 0, done.stderr
    return directory


BUILD = ("--tokenizer", "tokenizer", "--sequence-length", "64", "--set", "unit_bytes=40000")
INPUTS = ("--input", "corpus/json", "corpus/email")


def digests(dataset: Path) -> dict[str, str]:
    """Content of a dataset by file; plan.json is left out, since it names the inputs as they were given."""
    files = (path for path in sorted(dataset.rglob("*")) if path.is_file() and path.name not in UNEQUAL)
    return {str(path.relative_to(dataset)): file_sha256(path) for path in files}


UNEQUAL = ("plan.json", "manifest.json")


def test_an_array_on_a_slurm_cluster_builds_the_same_dataset(workdir: Path, slurm: dict[str, str]) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "rookery", "data", "build", *INPUTS, *BUILD, "--out", "array",
            "--array", "3", "--sbatch", "partition=batch", "--sbatch", "time=10", "--sbatch", "cpus-per-task=1",
        ],
        cwd=workdir, env={**slurm, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 tasks submitted, job " in done.stderr
    deadline = time.monotonic() + 120
    while not (workdir / "array").exists():
        assert time.monotonic() < deadline, [path.read_text() for path in (workdir / "array.jobs").glob("*.err")]
        time.sleep(0.5)
    assert digests(workdir / "array") == digests(workdir / "plain")
    verified = rookery("data", "verify", "array", cwd=workdir)
    assert verified.returncode == 0, verified.stdout


def test_slurm_says_why_it_refuses_an_array(workdir: Path, slurm: dict[str, str]) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "rookery", "data", "build", *INPUTS, *BUILD, "--out", "refused",
            "--array", "2", "--sbatch", "partition=nowhere",
        ],
        cwd=workdir, env={**slurm, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 12
    assert "build-refused: SLURM refuses the job: " in done.stderr
    assert "invalid partition specified: nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_array_on_this_machine_is_waited_for(workdir: Path) -> None:
    done = rookery("data", "build", *INPUTS, *BUILD, "--out", "local", "--array", "2", "--site", "local", cwd=workdir)
    assert done.returncode == 0, done.stderr
    assert "local: " in done.stdout
    assert digests(workdir / "local") == digests(workdir / "plain")


def test_a_failed_task_ends_with_its_message(workdir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": 3}\n')
    done = rookery(
        "data", "build", "--input", str(broken), *BUILD, "--out", "failed", "--array", "2", "--site", "local",
        cwd=workdir,
    )  # fmt: skip
    assert done.returncode == 12
    assert "2 of 2 tasks failed, the first with: " in done.stderr
    assert "broken.jsonl, line at byte 17: field text is no text but int" in done.stderr
    assert not (workdir / "failed").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--array", "0"), "--array 0: needs at least one task"),
        (("--site", "local"), "--sbatch, --site: are of use with --array alone"),
        (("--array", "2", "--set", "filters.deduplicate=documents"), "--array 2: filters.deduplicate needs ranks"),
        (("--array", "2", "--task", "1/2"), "--array 2: submits tasks; leave out --task"),
        (("--array", "2", "--site", "fronteer"), "no site 'fronteer' (did you mean 'frontier'?)"),
        (("--array", "2", "--site", "frontier"), "site frontier: jobs need an account"),
        (("--array", "2", "--site", "frontier", "--sbatch", "time=9h"), "2h"),
        (("--array", "2", "--sbatch", "time=1:00"), "'1:00' is not a duration"),
        (("--array", "2", "--sbatch", "exclusive"), "--sbatch exclusive: write it as KEY=VALUE"),
    ],
)
def test_a_wrong_array_is_refused(workdir: Path, flags: tuple[str, ...], message: str) -> None:
    done = rookery("data", "build", *INPUTS, *BUILD, "--out", "wrong", *flags, cwd=workdir)
    assert done.returncode == 12
    assert message in done.stderr
    assert not (workdir / "wrong").exists()
