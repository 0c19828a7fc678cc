"""A link at work, with ranks that train nothing: on this machine, and in chains on a real cluster."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm import joblog
from slurm.evaluation import Evaluation
from slurm.quarantine import FILE as QUARANTINE
from slurm.queue import job_states
from slurm.site import NodeLocal, load_site
from slurm.submission import submit_links
from tests.slurm.cluster import Cluster
from tests.slurm.submitted_run import endings, kinds, write_run

LINK = "import sys, pathlib\nfrom slurm.link import Link\nLink(pathlib.Path(sys.argv[1]))()"
LOCAL = load_site("local")


def link(run_dir: Path) -> subprocess.Popen[str]:
    """A link of site `local` in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", LINK, str(run_dir)], stderr=subprocess.PIPE, text=True)


def run_link(run_dir: Path) -> tuple[int, str]:
    """Run one to its end; return its exit status and what it said."""
    process = link(run_dir)
    said = process.communicate(timeout=30)[1]
    return process.returncode, said


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_local_chain_goes_on_until_the_run_is_finished(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, LOCAL, ["save", "crash", "disagree", "finish"])
    assert run_link(run)[0] == 0
    assert endings(run) == [10, None, 10, 0]
    records = joblog.read(run)
    launched = [record for record in records if record["kind"] == "launched"]
    assert [(record["launch"], record["attempts"], record["checkpoint"]) for record in launched] == [
        (1, 0, None),
        (2, 1, 10),
        (3, 2, 10),
        (4, 3, 10),
    ]
    assert all((run / record["log"]).is_dir() for record in launched)
    over = records[-1]
    assert (over["kind"], over["code"], over["reason"]) == ("over", 0, "finish")
    [crash] = run.glob("attempts/*/crash.json")  # attempts that end well have none
    found = json.loads(crash.read_text())
    assert (found["attempt"], found["class"], found["status"]) == (2, "unknown", 1)
    assert (found["log"], found["lines"]) == (f"{launched[1]['log']}/node-0.log", ["this is a crash"])


@pytest.mark.parametrize(
    ("action", "code", "reason"),
    [
        ("diverge", 11, "diverge"),
        ("refuse", 12, "train.steps: no"),
        ("stop", 1, "in a row"),
        ("done", 0, "finished before"),
        ("vanish", 1, "status 0; no attempt had begun"),
    ],
)
def test_a_chain_ends_itself_and_says_why(tmp_path: Path, action: str, code: int, reason: str) -> None:
    run = tmp_path / "run"
    write_run(run, LOCAL, [action])
    status, said = run_link(run)
    over = joblog.read(run)[-1]
    assert (status, over["code"]) == (code, code)
    assert reason in over["reason"]
    assert reason in said
    assert len(endings(run)) == (3 if code == 1 else 1)


def test_ranks_that_hang_before_their_attempt_begins_are_ended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, LOCAL, ["mute"], start_minutes=0.01, max_restarts=1)
    assert run_link(run)[0] == 1
    assert "no attempt began within 0.01 minutes (control.hang_start_minutes)" in joblog.read(run)[-1]["reason"]


def test_ranks_that_hang_before_their_attempt_begins_are_ended_when_the_run_is_cancelled(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, LOCAL, ["mute"])
    hurried = f"import slurm.link\nslurm.link._SECONDS_TO_END = 0.1\n{LINK}"
    process = subprocess.Popen([sys.executable, "-c", hurried, str(run)], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: "launched" in kinds(run))
    joblog.append(run, "cancelled", by="ada")
    assert "no attempt had begun" in process.communicate(timeout=30)[1]
    assert joblog.read(run)[-1]["reason"] == "cancelled by ada"


def test_a_link_after_the_end_of_its_chain_starts_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, LOCAL, ["finish"])
    joblog.append(run, "over", code=11, reason="diverged")
    assert run_link(run)[0] == 0
    assert kinds(run) == ["over"]


def test_a_signal_is_passed_on_once_and_ends_the_chain_here(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, LOCAL, ["wait", "finish"])
    process = link(run)
    wait_for((run / "attempts/0001").is_dir)
    for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
        process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 0
    assert endings(run) == [10]
    assert "ended by SIG" in said  # several at once arrive in any order
    assert joblog.read(run)[-1]["reason"].startswith("ended by SIG")


def test_ranks_of_a_cancelled_run_are_told_though_nobody_signals_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, LOCAL, ["wait", "finish"])
    process = link(run)
    wait_for((run / "attempts/0001").is_dir)
    joblog.append(run, "cancelled", by="ada")
    assert "squeue" not in process.communicate(timeout=30)[1]
    assert endings(run) == [10]
    assert "cancelled by ada" in joblog.read(run)[-1]["reason"]


def test_the_next_link_works_out_how_a_launch_ended_whose_job_died(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, LOCAL, ["hold", "finish"])
    process = link(run)
    wait_for((run / "attempts/0001").is_dir)
    [ranks] = children(process.pid)
    process.kill()
    process.wait()
    # What the ranks still could say counts, though no link heard it.
    (run / "attempts/0001/outcome.json").write_text(json.dumps({"exit_code": 11, "reason": "loss nan"}))
    os.kill(ranks, signal.SIGKILL)
    assert endings(run) == []
    died = time.time()
    assert run_link(run)[0] == 11
    assert endings(run) == [11]
    launched, ended = (
        next(each for each in joblog.read(run) if each["kind"] == kind) for kind in ("launched", "ended")
    )
    assert launched["time"] <= ended["time"] <= died  # what came after is not its time
    assert joblog.read(run)[-1]["reason"] == "loss nan"
    assert json.loads((run / "attempts/0001/crash.json").read_text())["summary"] == "diverged: loss nan"


def test_ranks_that_are_killed_are_told_so_by_their_link(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, LOCAL, ["hold", "finish"])
    process = link(run)
    wait_for((run / "attempts/0001").is_dir)
    [ranks] = children(process.pid)
    os.kill(ranks, signal.SIGKILL)
    said = process.communicate(timeout=30)[1]
    assert endings(run) == [None, 0]
    crash = run / "attempts/0001/crash.json"
    assert f"what is known of it: {crash}" in said
    assert json.loads(crash.read_text())["summary"] == "killed (SIGKILL)"


def test_what_could_not_be_staged_whole_is_removed_before_the_ranks_start(tmp_path: Path) -> None:
    run, disk, archive = tmp_path / "run", tmp_path / "nvme", tmp_path / "env.tar.gz"
    disk.mkdir()
    archive.write_bytes(b"no archive")
    site = dataclasses.replace(LOCAL, stage_method="copy", node_local=NodeLocal(path=str(disk), notes=""))
    write_run(run, site, ["wait"], stage=[str(archive)])
    process = link(run)
    wait_for((run / "attempts/0001").is_dir)
    assert list(disk.iterdir()) == []
    process.terminate()
    assert "not staged" in process.communicate(timeout=30)[1]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_an_unhealthy_node_is_quarantined_and_then_not_used(tmp_path: Path) -> None:
    run, host = tmp_path / "run", os.uname().nodename
    write_run(run, LOCAL, [f"bad={host}", "finish"])
    status, said = run_link(run)
    assert status == 1  # the only node there is
    assert json.loads((run / QUARANTINE).read_text())["node"] == host
    assert endings(run) == [13, 13, 13]
    assert len(list((run / "attempts").iterdir())) == 1
    assert "0 of the 1 nodes" in said


def test_a_chain_that_cannot_write_down_its_launches_does_not_repeat_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, LOCAL, ["crash"])
    (run / joblog.FILE).symlink_to("/proc/no/such/file")
    status, said = run_link(run)
    assert status == 1
    assert "make room" in said
    assert len(list((run / "attempts").iterdir())) == 1


@pytest.fixture
def here(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, reached by this process too."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    return cluster


def test_a_link_starts_nothing_beside_another_and_learns_its_end_from_the_queue(
    here: Cluster, test_site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    write_run(run, load_site(test_site), ["finish"], links=2)
    other = here.sh("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 60").strip()
    joblog.append(run, "began", job=other)
    launched = {"launch": 1, "nodes": ["n1"], "attempts": 0, "log": f"jobs/{other}/1", "checkpoint": None}
    joblog.append(run, "launched", job=other, **launched)
    wait_for(lambda: job_states([other])[other].state == "RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "4000000")
    hurried = f"import slurm.lookout\nslurm.lookout._SECONDS_TO_LEAVE = 0.1\n{LINK}"
    done = subprocess.run([sys.executable, "-c", hurried, str(run)], stderr=subprocess.PIPE, text=True, check=True)
    assert f"job {other} of this run is still at work" in done.stderr
    assert kinds(run) == ["began", "launched", "yielded"]
    joblog.append(run, "cancelled", by="ada")
    here.sh("scancel", other)
    wait_for(lambda: job_states([other])[other].over)
    assert run_link(run)[0] == 0
    assert kinds(run)[3:] == ["cancelled", "ended", "over"]
    assert joblog.read(run)[-2]["time"] == job_states([other])[other].end


def test_a_check_of_nodes_that_is_interrupted_blames_nobody_and_starts_nothing(
    here: Cluster, test_site: str, tmp_path: Path
) -> None:
    run, python = tmp_path / "run", tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n[ $SLURMD_NODENAME = n2 ] && exec sleep 60\n"
        "echo '{\"unhealthy\": false}' > $3/$SLURMD_NODENAME.json\n"
    )
    python.chmod(0o755)
    write_run(run, dataclasses.replace(load_site(test_site), python=str(python)), ["finish"], spares=1)
    submit_links(run)
    wait_for(lambda: list(run.glob("jobs/*/1/n1.json")))
    joblog.append(run, "cancelled", by="ada")
    wait_for(lambda: "over" in kinds(run))
    assert not (run / QUARANTINE).exists()
    assert "launched" not in kinds(run)


def test_an_array_leaves_a_bad_node_and_counts_no_crash_as_a_link(
    here: Cluster, test_site: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # Two elements of the array are used up by the bad node and the crash; the second submits another one.
    write_run(run, load_site(test_site), ["bad=n2", "crash", "finish"], nodes=2, links=2, chain="array")
    jobs = submit_links(run)
    assert len(jobs) == 2
    wait_for(lambda: "over" in kinds(run), 30.0)
    records = joblog.read(run)
    launched = [record["nodes"] for record in records if record["kind"] == "launched"]
    assert launched == [["n1", "n2"], ["n1", "n3"], ["n1", "n3"]]
    assert endings(run) == [13, None, 0]
    assert [record["continues"] for record in records if record["kind"] == "submitted"] == [False, True, True]
    # The links that were left over are taken out of the queue.
    wait_for(lambda: not here.sh("squeue", "--noheader", "--states=PENDING,RUNNING").strip())


def test_an_evaluation_whose_checkpoint_is_gone_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Evaluation(tmp_path, tmp_path / "checkpoints/step-00000010")()
    assert "step-00000010: it was pruned before the job began" in capsys.readouterr().err
    [record] = joblog.read(tmp_path)
    assert (record["kind"], record["step"]) == ("evaluation", 10)
    assert "pruned" in record["problem"]


def test_a_link_needs_no_torch() -> None:
    script = "import sys, slurm.link, slurm.evaluation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
