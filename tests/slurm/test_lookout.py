"""What a link asks of a real queue, and of one that does not answer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from slurm import queue
from slurm.lookout import Lookout
from tests.slurm.cluster import Cluster


@pytest.fixture
def here(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    return cluster


def submit(cluster: Cluster, *options: str) -> str:
    return cluster.sh("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap=sleep 60").strip()


def test_jobs_that_are_over_or_unknown_do_not_wait(here: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, cancelled = submit(here, "--hold"), submit(here, "--hold")
    here.sh("scancel", cancelled)
    ids = [cancelled, waiting, "4000000"]
    assert list(Lookout("1", local=False).living(ids)) == [waiting]
    assert Lookout("1", local=True).living(ids) == {}
    monkeypatch.setenv("PATH", "/nowhere")
    assert Lookout("1", local=False).living(ids) == dict.fromkeys(ids)


def test_a_waiting_job_is_kept_off_the_nodes_of_now_and_no_others(
    here: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, lookout = submit(here, "--hold", "--exclude=n1,n2"), Lookout("1", local=False)
    for nodes, always, expected in (
        (["n3"], ["n1"], {"n1", "n3"}),
        ([], ["n1"], {"n1"}),
        (["elsewhere"], ["n2"], {"n2"}),  # refused as a whole
        ([], [], set()),
    ):
        lookout.keep_off(lookout.living([job]), nodes, always)
        assert queue.excluded([job]) == {job: expected}
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/bash\nexit 1\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{here.environment['PATH']}")
    lookout.keep_off(lookout.living([job]), [], [])  # asks for nothing that is so already


def test_the_end_of_a_job_is_waited_for_but_not_long(here: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    running, waiting, lookout = submit(here), submit(here, "--hold"), Lookout("1", local=False)
    while queue.job_states([running])[running].state != "RUNNING":
        time.sleep(0.1)
    assert not lookout.left(running, hurry=lambda: True)
    monkeypatch.setattr("slurm.lookout._SECONDS_TO_LEAVE", 0.0)
    assert not lookout.left(running, hurry=lambda: False)
    assert lookout.left(waiting, hurry=lambda: False)
    monkeypatch.setattr("slurm.lookout._SECONDS_TO_LEAVE", 30.0)
    here.sh("scancel", running)
    assert lookout.left(running, hurry=lambda: False)
