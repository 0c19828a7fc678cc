"""Jobs of one node that evaluate a run's checkpoints: where they go, and how they leave the queue."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from slurm import joblog, queue
from slurm.cancel import cancel
from slurm.evaluation import Evaluations, evaluation_request
from slurm.quarantine import quarantine
from slurm.site import load_site
from slurm.submission import submit_links
from tests.slurm.cluster import Cluster
from tests.slurm.submitted_run import request, write_run


def test_an_evaluation_goes_where_one_node_may_go() -> None:
    leonardo = load_site("leonardo")
    run = request(nodes=100, partition="boost_usr_prod", qos="boost_qos_bprod", eval_minutes=20)  # 65 nodes or more
    asked = evaluation_request(run, Path("/run/checkpoints/step-00000010"), leonardo)
    assert (asked.nodes, asked.minutes, asked.partition, asked.qos) == (1, 20, "boost_usr_prod", None)
    run = request(nodes=2, partition="boost_usr_prod", qos="boost_qos_dbg", eval_minutes=20)
    assert evaluation_request(run, Path("/run"), leonardo).qos == "boost_qos_dbg"
    assert evaluation_request(request(), Path("/run"), load_site("local")).minutes == 10


def test_evaluations_avoid_bad_nodes_and_are_cancelled_with_their_run(
    cluster: Cluster, test_site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    run, site = tmp_path / "run", load_site(test_site)
    asked = write_run(run, site, ["finish"], eval_every=1, sbatch={"hold": ""})
    (run / "run.yaml").touch()
    [job] = submit_links(run)
    quarantine(run, "n2", "slow", job)
    evaluations = Evaluations(run, asked, site, job)
    evaluations.look({10: run / "checkpoints/step-00000010"})
    waiting = joblog.read(run)[-1]["evaluation_job"]
    assert "ExcNodeList=n2" in cluster.sh("scontrol", "show", "job", "-o", waiting)
    running = cluster.sh("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 60").strip()
    joblog.append(run, "evaluation", job=job, step=20, evaluation_job=running, problem=None)
    deadline = time.monotonic() + 20
    while queue.job_states([running])[running].state != "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.05)

    done = cancel(run)
    assert done == {"cancelled": [job, waiting], "signalled": [], "killed": [], "left": [running]}
    evaluations.look({30: run / "checkpoints/step-00000030"})
    assert joblog.read(run)[-1]["kind"] == "cancelled", "none is submitted any more"
    assert cancel(run, now=True)["killed"] == [running]
