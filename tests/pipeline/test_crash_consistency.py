"""Killed or without power at any write, sync or rename of a save: there is always a whole checkpoint to go on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.checkpoints.reader import newest_valid
from tests.faults.fork_server import ForkServer, fault_server
from tests.faults.interpose import Operation
from tests.faults.power_loss import Disk, Record, Tree, lay_out, read_records, tree_of
from tests.faults.saves import check_content, kill_everywhere, record, save

SHARD = "shard-00000.safetensors"
HALF = -1


@pytest.fixture(scope="module")
def server() -> ForkServer:
    return fault_server()


def run_before(scene: str, run_dir: Path) -> tuple[int, int | None]:
    """Make a run in which a save is due; return its step, and the newest checkpoint before it."""
    run_dir.mkdir()
    if scene == "first":
        return 4, None
    save(run_dir, 4)
    save(run_dir, 8)
    if scene == "third":  # upon which the first is removed
        return 12, 8
    assert scene == "replacing a broken one"
    (run_dir / "checkpoints/step-00000008" / SHARD).write_bytes(b"broken")
    return 8, 4


SCENES = pytest.mark.parametrize("scene", ["first", "third", "replacing a broken one"])


@SCENES
def test_a_save_killed_at_any_operation_leaves_a_run_that_goes_on(
    scene: str, server: ForkServer, tmp_path: Path
) -> None:
    run_dir, trials = tmp_path / "run", tmp_path / "trials"
    step, before = run_before(scene, run_dir)
    trials.mkdir()
    assert server.call(kill_everywhere, run_dir, step, trials) == 0
    found = set()
    known = newest_valid(run_dir)[1]
    for trial in trials.iterdir():
        reader, problems = newest_valid(trial)
        newest = None if reader is None else check_content(reader)
        assert newest in (before, step), trial
        assert problems.keys() <= known.keys(), trial  # what has its final name is whole
        found.add(newest)
        assert save(trial, step + 4) is None
        assert check_content(newest_valid(trial)[0]) == step + 4  # type: ignore[arg-type]
        assert not list((trial / "checkpoints").glob(".*")), trial
    assert found == {before, step}
    assert len(list(trials.iterdir())) > 20


@dataclass(frozen=True)
class Recording:
    """A save as it was done.

    Attributes:
        run_dir: the run, now saved.
        tree: what it held before.
        records: the operations of the save.
        step: its step.
        older: the newest intact checkpoint before it.
        broken: names of newer ones that were broken before.
    """

    run_dir: Path
    tree: Tree
    records: list[Record]
    step: int
    older: int | None
    broken: set[str]


def record_save(server: ForkServer, scene: str, tmp_path: Path) -> Recording:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    step, older = run_before(scene, run_dir)
    tree, broken = tree_of(run_dir), set(newest_valid(run_dir)[1])
    assert server.call(record, run_dir, step, log) == 0
    return Recording(run_dir, tree, read_records(log), step, older, broken)


class Judge:
    """Says which checkpoint a run goes on from, given what its disk holds; equal disks are looked at once.

    It says HALF of a disk on which something that is no whole checkpoint has the name of one, `broken` aside.
    """

    def __init__(self, place: Path, broken: set[str]) -> None:
        self._place, self._broken, self._known = place, broken, dict[Tree, int | None]()
        place.mkdir()

    def __call__(self, tree: Tree) -> int | None:
        if tree not in self._known:
            run_dir = self._place / str(len(self._known))
            lay_out(tree, run_dir)
            reader, problems = newest_valid(run_dir)
            step = None if reader is None else check_content(reader)
            self._known[tree] = step if problems.keys() <= self._broken else HALF
        return self._known[tree]


@SCENES
def test_a_power_cut_at_any_operation_leaves_the_old_checkpoint_or_the_new(
    scene: str, server: ForkServer, tmp_path: Path
) -> None:
    saved, found = record_save(server, scene, tmp_path), set()
    judge = Judge(tmp_path / "disks", saved.broken)
    disk = Disk(saved.run_dir, saved.tree)
    for operation in saved.records:
        found |= {judge(tree) for tree in disk.after_power_cut()}
        disk.do(operation)
    assert disk.now() == tree_of(saved.run_dir)  # nothing was done that the records lack
    assert found == {saved.older, saved.step}
    assert {judge(tree) for tree in disk.after_power_cut()} == {saved.step}


@SCENES
def test_a_power_cut_would_show_any_sync_that_a_save_lacked(scene: str, server: ForkServer, tmp_path: Path) -> None:
    saved = record_save(server, scene, tmp_path)
    judge = Judge(tmp_path / "disks", saved.broken)
    # The run directory is synced at every save, since a launch that was killed may have made `checkpoints` in it.
    syncs = [
        number
        for number, each in enumerate(saved.records)
        if each.kind is Operation.SYNC and (scene == "first" or each.path != saved.run_dir)
    ]
    assert len(syncs) >= 4  # shard, manifest, both directories
    for missing in syncs:
        disk = Disk(saved.run_dir, saved.tree)
        for operation in saved.records[:missing] + saved.records[missing + 1 :]:
            disk.do(operation)
        assert {judge(tree) for tree in disk.after_power_cut()} != {saved.step}, saved.records[missing]
