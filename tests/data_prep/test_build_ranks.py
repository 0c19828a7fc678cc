"""Builds on several real MPI ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.build import build_dataset
from data_prep.config import BuildConfig
from data_prep.filters import FilterConfig
from data_prep.world import World
from slurm.local import rank_command, rank_environment

ROOT = Path(__file__).resolve().parents[2]
SMALL_UNITS = BuildConfig(unit_bytes=15_000)  # so that every rank has several


def mpiexec(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = rank_command(ranks, [sys.executable, *arguments])
    environment = {**rank_environment(ranks), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def build_on(ranks: int, corpus: Path, tokenizer: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return mpiexec(
        ranks, "-m", "rookery", "data", "build", "--input", str(corpus), "--tokenizer", str(tokenizer),
        "--sequence-length", "255", "--out", str(out), "--set", "unit_bytes=15000",
        "--set", "engine=tokenizers", *more,
    )  # fmt: skip


def tree(directory: Path) -> dict[Path, bytes]:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, ranks: int
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    manifest = build_dataset([corpus], tokenizer_dir, 255, alone, World(), config=SMALL_UNITS)
    assert len(manifest.parts) > 2 * ranks
    result = build_on(ranks, corpus, tokenizer_dir, together)
    assert result.returncode == 0, result.stderr
    assert tree(together) == tree(alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]


def test_duplicates_are_found_across_ranks(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.list"
    both.write_text(f"{corpus}\n{corpus}\n")
    filters = FilterConfig(deduplicate="documents")
    config = BuildConfig(unit_bytes=15_000, filters=filters)
    manifest = build_dataset([both], tokenizer_dir, 255, tmp_path / "alone", World(), config=config)
    assert (manifest.documents, manifest.counters) == (10, {"duplicate_documents": 10})
    result = build_on(3, both, tokenizer_dir, tmp_path / "together", "--set", "filters.deduplicate=documents")
    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "together") == tree(tmp_path / "alone")


def test_a_slow_file_does_not_idle_the_other_ranks(tmp_path: Path) -> None:
    program = """
import json, sys, time
from pathlib import Path
from data_prep.dispatch import Dispatcher
from data_prep.world import World
world = World.discover()
dispatcher = Dispatcher(world, 12)
mine = []
while (piece := dispatcher.take()) is not None:
    mine.append(piece)
    for _ in range(10):
        time.sleep(0.1 if piece == 0 else 0.005)
        dispatcher.tick(len(mine))
    dispatcher.ask_ahead()
dispatcher.close(lambda: None)
shares = world.gather(mine)
if shares:
    Path(sys.argv[1]).write_text(json.dumps(shares))
"""
    result = mpiexec(3, "-c", program, str(tmp_path / "shares.json"))
    assert result.returncode == 0, result.stderr
    shares = json.loads((tmp_path / "shares.json").read_text())
    assert sorted(piece for share in shares for piece in share) == list(range(12))
    (slow,) = (share for share in shares if 0 in share)
    assert len(slow) <= 3
    assert all(len(share) >= 3 for share in shares if share is not slow)


def test_a_report_after_the_last_piece_was_given_out_is_received(tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from data_prep.dispatch import Dispatcher
from data_prep.world import World
world = World.discover()
dispatcher = Dispatcher(world, 1)
if world.rank == 0:
    while not dispatcher.done:
        dispatcher.tick(0)
else:
    assert dispatcher.take() == 0
    dispatcher.tick(1)
    dispatcher.ask_ahead()
    time.sleep(1.0)  # rank 0 has long answered that nothing is left
    dispatcher.tick(2)
assert dispatcher.take() is None
dispatcher.close(lambda: None)
if world.rank == 0:
    Path(sys.argv[1]).write_text(str(dispatcher.done))
"""
    result = mpiexec(2, "-c", program, str(tmp_path / "done"))  # MPI ends with an error where a message is left over
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "done").read_text() == "2"


def test_a_bad_document_of_another_rank_ends_both_with_its_name(tokenizer_dir: Path, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("All is well here.\n" * 2_000)
    bad = tmp_path / "d.txt"
    bad.write_bytes(b"All is well here.\n" * 1_900 + b"\xff")
    result = build_on(2, tmp_path, tokenizer_dir, tmp_path / "out")
    assert result.returncode == 12, result.stderr
    assert f"{bad}: not UTF-8 at byte 34200" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("not UTF-8") == 1
    assert not (tmp_path / "out").exists()


def test_verify_shares_the_parts_among_the_ranks(dataset: Path) -> None:
    assert mpiexec(2, "-m", "rookery", "data", "verify", str(dataset)).returncode == 0
    for part in (0, 1):
        shard = dataset / f"part-{part:05d}" / "c.0.0"
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    result = mpiexec(2, "-m", "rookery", "data", "verify", str(dataset))
    assert result.returncode == 12
    found = [line for line in result.stdout.splitlines() if "sha256" in line]
    assert ["part-00000" in found[0], "part-00001" in found[1], len(found)] == [True, True, 2]
