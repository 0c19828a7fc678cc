"""Builds that are killed at any moment, by a real SIGKILL on real ranks, go on and end with the same bytes."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.build import BuildReport, build_dataset, build_share
from data_prep.config import BuildConfig
from data_prep.errors import DataError
from data_prep.filters import FilterConfig
from data_prep.manifest import Manifest
from data_prep.readers import ReaderOptions
from data_prep.workspace import Workspace
from data_prep.world import World
from slurm.local import rank_command, rank_environment

ROOT = Path(__file__).resolve().parents[2]
SMALL_UNITS = BuildConfig(unit_bytes=15_000, engine="tokenizers")
DEDUPLICATED = BuildConfig(unit_bytes=15_000, filters=FilterConfig(deduplicate="documents"), engine="tokenizers")

# Dies at the given call of a function of the system, on one rank: that is where half-done work can lie about.
BUILD_AND_DIE = """
import os, signal, sys
from pathlib import Path
from data_prep.build import build_dataset
from data_prep.config import BuildConfig
from data_prep.filters import FilterConfig
from data_prep.world import World
corpus, tokenizer, out, deduplicate, function, call, rank = sys.argv[1:]
world = World.discover()
real, left = getattr(os, function), [int(call)]
def dying(*arguments, **named):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)
if world.rank == int(rank):
    setattr(os, function, dying)
config = BuildConfig(unit_bytes=15_000, filters=FilterConfig(deduplicate=deduplicate), engine="tokenizers")
build_dataset([Path(corpus)], Path(tokenizer), 255, Path(out), world, config=config)
"""


SMALLEST_FIRST = """
import data_prep.build
data_prep.build._largest_first = lambda units: sorted(units, key=lambda unit: unit.bytes)
"""
HOLD_A_CLAIM = """
import sys
from pathlib import Path
from data_prep.workspace import Workspace
workspace = Workspace(Path(sys.argv[1]))
workspace.root.mkdir()
with workspace.claim(3) as claimed:
    print(claimed, flush=True)
    sys.stdin.read()
"""


def tree(directory: Path) -> dict[Path, bytes]:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def build_and_die(
    ranks: int, corpus: Path, tokenizer_dir: Path, out: Path, *, function: str = "fsync", call: int = 0, rank: int = 0,
    deduplicate: str = "none",
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Build on `ranks` ranks; rank `rank` is killed at the `call`-th call of os.`function`, 0 for never."""
    arguments = [str(corpus), str(tokenizer_dir), str(out), deduplicate, function, str(call), str(rank)]
    command = rank_command(ranks, [sys.executable, "-c", BUILD_AND_DIE, *arguments])
    environment = {**rank_environment(ranks), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.fixture(scope="session")
def uninterrupted(corpus: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    build_dataset([corpus], tokenizer_dir, 255, out, World(), config=SMALL_UNITS)
    return out


@pytest.mark.parametrize(
    ("function", "call", "rank", "restart_on"),
    [
        ("fsync", 1, 0, 2),  # before anything is finished
        ("fsync", 14, 0, 1),  # in the middle of a part
        ("rename", 3, 1, 3),  # between a part and its record, or around them
        ("rename", 4, 1, 2),
        ("rename", 5, 0, 2),
        ("fsync", 10, 1, 3),
        ("rmdir", 1, 0, 1),  # the dataset has its name, its workspace is half gone
    ],
)
def test_a_killed_build_goes_on_with_any_number_of_ranks(
    corpus: Path,
    tokenizer_dir: Path,
    uninterrupted: Path,
    tmp_path: Path,
    function: str,
    call: int,
    rank: int,
    restart_on: int,
) -> None:
    out = tmp_path / "out"
    killed = build_and_die(2, corpus, tokenizer_dir, out, function=function, call=call, rank=rank)
    assert killed.returncode != 0
    assert out.exists() == (function == "rmdir")
    again = build_and_die(restart_on, corpus, tokenizer_dir, out)
    assert again.returncode == 0, again.stderr
    assert tree(out) == tree(uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_build_that_is_killed_again_and_again_ends(
    corpus: Path, tokenizer_dir: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out, finished = tmp_path / "out", []
    for attempt in range(20):
        if build_and_die(1 + attempt % 3, corpus, tokenizer_dir, out, function="rename", call=7).returncode == 0:
            break
        finished.append(len(Workspace(out).finished_units()))
    assert tree(out) == tree(uninterrupted)
    assert len(finished) >= 2
    assert finished == sorted(set(finished)), "every attempt gets further"


def test_what_is_finished_is_not_done_again(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert build_and_die(1, corpus, tokenizer_dir, out, function="rename", call=10).returncode != 0
    workspace = Workspace(out)
    finished = workspace.finished_units()
    assert len(finished) >= 3
    before = {path: path.stat().st_ino for path in workspace.data.glob("part-*/c.0.0")}
    reports: list[BuildReport] = []
    build_dataset([corpus], tokenizer_dir, 255, out, World(), config=SMALL_UNITS, progress=reports.append)
    after = {path.stat().st_ino for path in out.glob("part-*/c.0.0")}
    assert len(after.intersection(before.values())) >= len(finished)
    assert reports[0].bytes_before > 0


def test_a_build_without_duplicates_is_resumed_too(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.list"
    both.write_text(f"{corpus}\n{corpus}\n")
    whole, out = tmp_path / "whole", tmp_path / "out"
    build_dataset([both], tokenizer_dir, 255, whole, World(), config=DEDUPLICATED)
    for rank, call in ((1, 4), (0, 12), (0, 4)):  # among the flags of duplicates, among them or later, among the parts
        killed = build_and_die(
            2, both, tokenizer_dir, out, function="rename", call=call, rank=rank, deduplicate="documents"
        )
        assert killed.returncode != 0
    assert build_and_die(3, both, tokenizer_dir, out, deduplicate="documents").returncode == 0
    assert tree(out) == tree(whole)


def interrupt(corpus: Path, tokenizer_dir: Path, out: Path) -> int:
    """Leave a build with some units finished; return their number."""
    assert build_and_die(1, corpus, tokenizer_dir, out, function="rename", call=10).returncode != 0
    return len(Workspace(out).finished_units())


def test_a_build_is_not_continued_with_other_settings(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished = interrupt(corpus, tokenizer_dir, out)
    with pytest.raises(DataError, match=r"\.out\.partial: .* other settings \(sequence_length was 255, now 127\)"):
        build_dataset([corpus], tokenizer_dir, 127, out, World(), config=SMALL_UNITS)
    assert len(Workspace(out).finished_units()) == finished


def test_a_build_that_is_refused_leaves_the_work_of_others_alone(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    workspace = Workspace(out)
    workspace.prepare({"sequence_length": 127})  # begun a moment ago: nothing is finished yet
    with pytest.raises(DataError, match=r"other settings \(sequence_length was 127, now 255"):
        build_dataset([corpus], tokenizer_dir, 255, out, World(), config=SMALL_UNITS)
    assert workspace.data.is_dir()


def test_units_whose_inputs_have_changed_are_done_again(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    inputs, out = tmp_path / "inputs", tmp_path / "out"
    inputs.mkdir()
    for path in corpus.iterdir():
        (inputs / path.name).write_bytes(path.read_bytes())
    interrupt(inputs, tokenizer_dir, out)
    for path in inputs.iterdir():
        path.write_text(path.read_text().replace("the", "eht"))
    build_dataset([inputs], tokenizer_dir, 255, out, World(), config=SMALL_UNITS)
    build_dataset([inputs], tokenizer_dir, 255, tmp_path / "whole", World(), config=SMALL_UNITS)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_bad_document_costs_no_finished_work(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")  # the smallest unit, hence the last
    inputs, out = [corpus, tmp_path / "bad.txt"], tmp_path / "out"
    config = BuildConfig(unit_bytes=1, engine="tokenizers")
    with pytest.raises(
        DataError, match=r"bad\.txt: not UTF-8 at byte 0 .*; 10 of 11 units .* kept in .*\.out\.partial"
    ):
        build_dataset(inputs, tokenizer_dir, 255, out, World(), config=config)
    skipping = BuildConfig(unit_bytes=1, engine="tokenizers", readers=ReaderOptions(on_bad_document="skip"))
    reports: list[BuildReport] = []
    manifest = build_dataset(inputs, tokenizer_dir, 255, out, World(), config=skipping, progress=reports.append)
    assert manifest.counters["skipped"] == 1
    assert not reports or reports[0].bytes_before > 0


def test_a_full_disk_ends_the_build_and_keeps_what_is_finished(
    corpus: Path, tokenizer_dir: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sizes = sorted(path.stat().st_size for path in uninterrupted.glob("part-*/c.0.0"))

    def limit_file_size() -> None:  # the kernel refuses to write more, as a full disk or a quota does
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-2] + 1, resource.RLIM_INFINITY))

    # Small parts are written first, so that something is finished when the large one does not fit.
    program = BUILD_AND_DIE.replace("world = World", f"{SMALLEST_FIRST}world = World")
    arguments = [str(corpus), str(tokenizer_dir), str(out), "none", "fsync", "0", "0"]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=limit_file_size,
    )  # fmt: skip
    assert result.returncode != 0
    assert f"DataError: {tmp_path}/.out.partial" in result.stderr
    assert "cannot be written (File too large); make room and start the same command again; " in result.stderr
    assert not out.exists()
    workspace = Workspace(out)
    assert len(workspace.finished_units()) > 3
    assert not list(workspace.data.glob(".*"))
    build_dataset([corpus], tokenizer_dir, 255, out, World(), config=SMALL_UNITS)
    assert tree(out) == tree(uninterrupted)


def test_a_disk_that_is_full_is_called_full(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No space left on device\); make room"), Workspace(tmp_path / "x").writing():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))


def test_two_builds_do_not_work_on_one_dataset(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_A_CLAIM, str(out)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    workspace = Workspace(out)
    with workspace.claim(3) as mine:
        assert not mine
    with workspace.claim(4) as mine:
        assert mine
    workspace.close()
    holder.kill()
    holder.wait()
    with workspace.claim(3) as mine:
        assert mine, "a lock ends with its process"
    workspace.close()


def test_tasks_of_an_array_make_the_same_dataset(
    corpus: Path, tokenizer_dir: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def command(task: int) -> list[str]:
        return [
            sys.executable, "-m", "rookery", "data", "build", "--input", str(corpus), "--tokenizer", str(tokenizer_dir),
            "--sequence-length", "255", "--out", str(out), "--set", "unit_bytes=15000",
            "--set", "engine=tokenizers", "--task", f"{task}/3",
        ]  # fmt: skip

    environment = {**rank_environment(1), "PYTHONPATH": str(ROOT), "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_ID": "1"}
    tasks = [
        subprocess.Popen(command(task), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for task in (1, 3)
    ]
    for task in tasks:
        _, errors = task.communicate(timeout=120)
        assert task.returncode == 0, errors
    assert tree(out) == tree(uninterrupted), "the two have done the work of the third"
    late = subprocess.run(command(2), env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert late.returncode == 0, late.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_task_loses_only_its_unit(
    corpus: Path, tokenizer_dir: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(corpus, tokenizer_dir, out)
    manifest = build_share([corpus], tokenizer_dir, 255, out, (2, 2), config=SMALL_UNITS)
    assert manifest == Manifest.load(uninterrupted)
    assert tree(out) == tree(uninterrupted)


@pytest.mark.parametrize("step", ["prepare", "claim", "finish_unit"])
def test_a_task_that_others_overtake_finds_the_dataset(
    corpus: Path, tokenizer_dir: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    out = tmp_path / "out"
    real = getattr(Workspace, step)

    def overtaken(workspace: Workspace, *arguments: object) -> object:
        if not out.exists():  # as if the last of the other tasks had just ended
            shutil.copytree(uninterrupted, out)
            shutil.rmtree(workspace.root, ignore_errors=True)
        return real(workspace, *arguments)

    monkeypatch.setattr(Workspace, step, overtaken)
    assert build_share([corpus], tokenizer_dir, 255, out, (1, 2), config=SMALL_UNITS) == Manifest.load(uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("task", [(0, 2), (3, 2)])
def test_a_task_outside_of_its_array_is_refused(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, task: tuple[int, int]
) -> None:
    with pytest.raises(DataError, match=r"--task \d/2: should be between 1/2 and 2/2"):
        build_share([corpus], tokenizer_dir, 255, tmp_path / "out", task)
