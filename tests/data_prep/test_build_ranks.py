"""Builds on several real MPI ranks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.build import build_dataset
from data_prep.world import World

ROOT = Path(__file__).resolve().parents[2]
# The command line chooses the size of a unit itself; small units give every rank several.
BUILD_IN_SMALL_UNITS = """
import sys
from pathlib import Path
from data_prep.build import build_dataset
from data_prep.world import World
corpus, tokenizer, out = map(Path, sys.argv[1:])
build_dataset([corpus], tokenizer, 255, out, World.discover(), unit_bytes=15_000)
"""


def mpiexec(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).parent / "mpiexec"
    launcher = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert launcher is not None, "these tests need mpiexec: install the `mpi` extra or load the site's MPI module"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [launcher, "-n", str(ranks), sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def tree(directory: Path) -> dict[Path, bytes]:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, ranks: int
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    manifest = build_dataset([corpus], tokenizer_dir, 255, alone, World(), unit_bytes=15_000)
    assert len(manifest.parts) > 2 * ranks
    result = mpiexec(ranks, "-c", BUILD_IN_SMALL_UNITS, str(corpus), str(tokenizer_dir), str(together))
    assert result.returncode == 0, result.stderr
    assert tree(together) == tree(alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]


def test_a_bad_document_of_the_second_rank_ends_both_with_its_name(tokenizer_dir: Path, tmp_path: Path) -> None:
    # Two units, since each document is larger than the smallest unit: the larger for rank 0, the other for rank 1.
    good, bad = tmp_path / "a.txt", tmp_path / "b.txt"
    good.write_text("All is well here.\n" * 70_000)
    bad.write_bytes(b"All is well here.\n" * 60_000 + b"\xff")
    out = tmp_path / "out"
    result = mpiexec(
        2, "-m", "rookery", "data", "build", "--input", str(good), str(bad), "--tokenizer", str(tokenizer_dir),
        "--sequence-length", "255", "--out", str(out),
    )  # fmt: skip
    assert result.returncode == 12, result.stderr
    assert f"{bad}: not UTF-8 at byte 1080000" in result.stderr
    assert "rank 1" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]
