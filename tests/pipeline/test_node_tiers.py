"""What the nodes hold of a run is found again after a restart, whoever of them is lost, and nobody else's is taken."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.world import World
from pipeline.checkpoints.commit import remove_directory
from pipeline.checkpoints.manifest import WEIGHT, list_checkpoints
from pipeline.checkpoints.node_directory import NodeTier, NodeTierConfig, discard_abandoned, discard_all, find_place
from pipeline.checkpoints.node_tiers import survey
from pipeline.checkpoints.partner import Partner
from pipeline.checkpoints.reader import CheckpointReader
from pipeline.errors import ConfigError
from slurm.local import rank_command, rank_environment
from tests.pipeline.node_tier_ranks import NUMEL, PARAMETER, weights
from tests.ranks import forked_python

ROOT = Path(__file__).parents[2]
OWN = f"rookery-{os.geteuid()}"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four ranks on two nodes wrote, in one launch for all cases."""
    out = tmp_path_factory.mktemp("tiers")
    done = subprocess.run(
        rank_command(4, [*forked_python(), "-m", "tests.pipeline.node_tier_ranks", str(out)]),
        cwd=ROOT,
        env={**rank_environment(4), "LOCAL_WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def seen(out: Path, case: str) -> list[dict[str, Any]]:
    """What each rank saw in a case."""
    return [json.loads((out / f"{rank}.json").read_text())[case] for rank in range(4)]


def seen_by_all(out: Path, case: str) -> dict[str, Any]:
    """What all ranks saw alike, but for how long it took."""
    records = [{name: value for name, value in record.items() if name != "seconds"} for record in seen(out, case)]
    assert all(record == records[0] for record in records), records
    return records[0]


def assert_whole(directory: Path, step: int) -> None:
    """Every bit of the checkpoint is what was saved."""
    reader = CheckpointReader(directory)
    expected = weights(step)
    assert reader.manifest.progress.step == step
    assert torch.equal(reader.weight(PARAMETER), expected)
    assert torch.equal(reader.slice(PARAMETER, "exp_avg", 0, NUMEL), expected * 2)
    assert reader.slice(PARAMETER, WEIGHT, 990, 20).tolist() == expected[990:1010].tolist()


def test_each_rank_receives_the_bytes_of_the_rank_of_its_place_on_the_node_before(out: Path) -> None:
    for rank, record in enumerate(seen(out, "exchange")):
        source = (rank + 2) % 4
        assert record["partner"] == source
        sizes = [10_000 + source, 10_001 + source, 0, 2_500 + source]
        assert record["received"] == [[size, [source] if size else []] for size in sizes]
        assert record["last"] == ("late" if rank < 2 else "early")
        assert record["waited"] == ([True] if rank < 2 else [])


def test_the_bytes_go_round_the_nodes(out: Path) -> None:
    for rank, record in enumerate(seen(out, "ring_of_four")):
        assert record["received"] == [record["source"]] == [(rank - 1) % 4]
        assert record["target"] == (rank + 1) % 4


def test_nodes_that_are_one_host_have_names_of_their_own(out: Path) -> None:
    names = json.loads((out / "0.json").read_text())["names"]
    assert len(set(names)) == 2
    assert seen_by_all(out, "nothing_yet") == {"steps": [], "problems": {}}


def test_the_loss_of_a_node_loses_nothing(out: Path) -> None:
    found = seen_by_all(out, "lost_node")
    assert found["whole"] == found["left"] == {"steps": [20, 10], "problems": {}}
    assert found["readers"] == [0, 1, 2, 3]  # each has its share of the work
    assert_whole(Path(found["promoted"]), 20)
    assert list_checkpoints(out / "lost_node") == [Path(found["promoted"])]


def test_a_corrupt_copy_is_named_and_the_partners_is_used(out: Path) -> None:
    found = seen_by_all(out, "corrupt_copy")
    assert list(found["problems"]) == [found["bad"]]
    assert found["bad"] in found["problems"][found["bad"]]
    assert_whole(Path(found["promoted"]), 30)


def test_a_file_that_goes_bad_after_the_check_becomes_no_checkpoint(out: Path) -> None:
    bad = seen_by_all(out, "corrupt_copy")["bad"]
    assert all(record["error"].startswith(f"{bad}: changed") for record in seen(out, "changed_since_check"))
    assert list((out / "changed" / "checkpoints").iterdir()) == []


def test_a_damaged_manifest_is_a_problem_and_the_partners_is_used(out: Path) -> None:
    found = seen_by_all(out, "damaged_manifest")
    assert found["steps"] == [30, 20, 10]
    assert list(found["problems"]) == [found["path"]]


def test_a_full_disk_is_the_error_of_all_ranks_and_leaves_nothing(out: Path) -> None:
    records = seen(out, "full_disk")
    for record in records:
        assert record["promoted"] is None
        assert record["left"] == []
        assert "ValueError" in record["kinds"]
        assert "File too large" in record["error"]
        assert str(out / "full_disk" / "checkpoints") in record["error"]
    (own,) = [record["error"] for record in records if "CheckpointError" in record["kinds"]]
    assert sum(record["error"].startswith(own) for record in records) == 4
    assert_whole(Path(records[0]["afterwards"]["promoted"]), 30)


def test_without_a_good_copy_there_is_the_older_checkpoint(out: Path) -> None:
    found = seen_by_all(out, "all_copies_bad")
    assert found["step"] == 30
    assert not found["usable"]
    assert found["good"] in found["bad"]
    assert found["steps"] == [20, 10]
    (problem,) = found["problems"].values()
    assert "shard-00001.safetensors" in problem


def test_files_are_found_together_over_tiers(out: Path) -> None:
    found = seen_by_all(out, "two_tiers")
    assert found["tiers"] == ["memory", "local"]
    assert_whole(Path(found["promoted"]), 40)


def test_a_checkpoint_of_another_run_is_not_taken(out: Path) -> None:
    found = seen_by_all(out, "other_runs_checkpoint")
    assert found["steps"] == [40, 20, 10]
    assert "another" in found["problems"][found["path"]]


def test_what_lies_beyond_the_step_of_a_restart_is_removed(out: Path) -> None:
    _, second = json.loads((out / "0.json").read_text())["names"]
    run = f"memory/{OWN}/0123abcd"
    assert seen_by_all(out, "resumed_before")["left"] == [
        f"{run}/{second}/step-00000010",
        f"{run}/{second}/step-00000020",
    ]
    assert seen_by_all(out, "resumed_before")["local"] == []


def test_a_finished_run_gives_everything_back(out: Path) -> None:
    assert seen_by_all(out, "finished") == {"left": []}


def directory_of_others(directory: Path) -> Path:
    """A directory in which all users may make files, as /dev/shm is."""
    directory.mkdir()
    directory.chmod(0o1777)
    return directory


def plant(directory: Path, kind: str) -> str:
    """Put there what another user could; return what must be said of it."""
    own = directory / OWN
    if kind == "link":
        elsewhere = directory / "elsewhere"
        elsewhere.mkdir()
        own.symlink_to(elsewhere)
        return "is not a directory"
    own.mkdir()
    if kind == "owner":
        os.chown(own, 4321, 4321)
        return "belongs to another user"
    if kind == "mode":
        own.chmod(0o777)
        return "others may write"
    own.chmod(0o700)
    directory.chmod(0o777)
    return "others may rename"


@pytest.mark.parametrize(
    "kind",
    [
        "link",
        "mode",
        "no sticky bit",
        pytest.param("owner", marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")),
    ],
)
def test_what_another_user_could_have_planted_is_refused(kind: str, tmp_path: Path) -> None:
    directory = directory_of_others(tmp_path / "shm")
    said = plant(directory, kind)
    tiers = {"memory": NodeTierConfig(every=1, directory=str(directory))}
    with pytest.raises(ConfigError, match=said):
        NodeTier(directory, "run", "node")
    with pytest.raises(ConfigError, match=r"checkpoint\.memory\.directory"):
        survey(World(), tiers, "run")


def test_a_directory_of_another_user_is_refused_unless_it_is_sticky_and_a_finished_run_does_not_mind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "others"
    directory.mkdir(mode=0o755)
    if os.geteuid() == 0:  # root's directories are trusted
        os.chown(directory, 4243, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(ConfigError, match=r"belongs to another user .* who may rename"):
        NodeTier(directory, "run", "node")
    discard_all(World(), {"memory": NodeTierConfig(every=1, directory=str(directory))}, "run")
    monkeypatch.undo()
    directory.chmod(0o1777)
    NodeTier(directory, "run", "node").close()


def test_only_its_user_can_look_into_a_tier(tmp_path: Path) -> None:
    tier = NodeTier(directory_of_others(tmp_path / "shm"), "run", "node")
    assert tier.path == tmp_path / "shm" / OWN / "run" / "node"
    assert [path.stat().st_mode & 0o777 for path in (tier.path, *tier.path.parents[:2])] == [0o700] * 3
    tier.close()


@pytest.mark.parametrize("name", ["..", "a/b", ".hidden", ""])
def test_names_do_not_lead_out_of_the_directory(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be the name"):
        NodeTier(tmp_path, name, "node")
    with pytest.raises(ConfigError, match="cannot be the name"):
        NodeTier(tmp_path, "run", name)


def test_a_directory_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.local\.directory"):
        NodeTier(tmp_path / "absent", "run", "node")


def test_what_dead_runs_left_is_removed_and_what_living_or_young_ones_have_is_not(tmp_path: Path) -> None:
    tiers = {run: NodeTier(tmp_path, run, "node") for run in ("dead", "young", "living", "own")}
    for run in ("dead", "young", "own"):
        (tiers[run].path / "step-00000010").mkdir()
        tiers[run].close()
    for run in ("dead", "living", "own"):
        for path in (tiers[run].path, tiers[run].path.parent):
            os.utime(path, (0, 0))
    assert discard_abandoned(tmp_path, "own") == ["dead"]
    assert sorted(path.name for path in (tmp_path / OWN).iterdir()) == ["living", "own", "young"]
    tiers["living"].close()
    assert discard_abandoned(tmp_path, "own") == ["living"]


def test_a_tier_that_is_opened_while_its_run_is_cleared_away_is_a_new_one(tmp_path: Path) -> None:
    NodeTier(tmp_path, "run", "node").close()
    run, opened = tmp_path / OWN / "run", list[NodeTier]()
    opening = threading.Thread(target=lambda: opened.append(NodeTier(tmp_path, "run", "node")))
    with (run / ".lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        opening.start()
        opening.join(0.1)
        assert not opened
        remove_directory(run)
    opening.join()
    assert opened[0].path.is_dir()
    assert (run / ".lock").exists()


def test_a_single_rank_has_no_partner() -> None:
    assert Partner.build(World(), find_place(World())) == (None, "all ranks are on one node")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"every": 0}, "checkpoint.memory.every: 0"),
        ({"keep": 0}, "checkpoint.memory.keep: 0"),
        ({"every": 5}, "checkpoint.memory.directory: null"),
        ({"directory": "shm"}, "checkpoint.memory.directory: 'shm'"),
    ],
)
def test_bad_settings_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NodeTierConfig(**fields).check("memory")
    assert str(caught.value).startswith(said)
