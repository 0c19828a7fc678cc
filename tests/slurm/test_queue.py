import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm import joblog, queue
from slurm.cancel import cancel
from slurm.status import status
from tests.slurm.cluster import Cluster

# A rank that takes its time to save.
RANK = """
import signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("begun", flush=True)
signal.sigwait({signal.SIGTERM})
time.sleep(4)
print("saved", flush=True)
sys.exit(10)
"""


@pytest.fixture
def here(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, reached by this process's own environment."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    return cluster


def _submit(cluster: Cluster, folder: Path, script: str, *options: str) -> str:
    given = ("--parsable", "--time=10", f"--output={folder}/%j.log", "--open-mode=append", *options)
    return cluster.sh("sbatch", *given, f"--wrap={script}").strip()


def _until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_queue_tells_of_jobs_that_wait_run_and_have_ended(here: Cluster, tmp_path: Path) -> None:
    all_nodes = ("--nodes=3", "--exclusive")
    failed = _submit(here, tmp_path, "exit 7")
    _until(lambda: queue.job_states([failed])[failed].over)
    running = _submit(here, tmp_path, "sleep 60", *all_nodes)
    _until(lambda: queue.job_states([running])[running].state == "RUNNING")
    array = _submit(here, tmp_path, "sleep 60", "--exclusive", "--array=0-2%1")
    after = _submit(here, tmp_path, "sleep 60", f"--dependency=afterany:{running}", "--comment=/some/run")
    _until(lambda: queue.job_states([f"{array}_0"])[f"{array}_0"].reason in ("Resources", "Priority"))
    _until(lambda: queue.job_states([after])[after].reason == "Dependency")

    jobs = queue.job_states([running, f"{array}_2", after, failed, "4000000"])

    assert set(jobs) == {running, f"{array}_2", after, failed}
    assert (jobs[failed].state, jobs[failed].exit_code, jobs[failed].over) == ("FAILED", 7, True)
    assert (jobs[after].state, jobs[after].exit_code) == ("PENDING", None)
    job = jobs[running]
    assert job.node_list == "n[1-3]"
    assert job.nodes == 3
    assert 500 < (job.time_left_seconds or 0) <= 600
    assert abs((job.start or 0) - time.time()) < 60
    assert not job.over
    assert queue.own_jobs()[after] == "/some/run"
    assert set(queue.partitions()) >= {"batch", "low", "high"}

    assert queue.excluded([after, "4000000"]) == {after: set()}
    queue.exclude([after], ["n1", "n2"])
    assert queue.excluded([after, f"{array}_2"]) == {after: {"n1", "n2"}, f"{array}_2": set()}
    queue.exclude([after], [])
    assert queue.excluded([after]) == {after: set()}
    with pytest.raises(queue.QueueError, match="Invalid node name"):
        queue.exclude([after], ["nowhere"])
    queue.scancel([after, failed, "4000000"])
    assert queue.job_states([after]).get(after, job).state in ("CANCELLED", "RUNNING")
    assert queue.node_states(["n1", "n2", "nowhere"]).keys() == {"n1", "n2"}
    assert not any(map(queue.lost, queue.node_states(["n1", "n2"]).values()))


def test_a_cancelled_run_saves_first_and_its_waiting_links_leave_the_queue(here: Cluster, tmp_path: Path) -> None:
    # The ranks need longer than KillWait for their save; the batch script sees them end, as a link does.
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (tmp_path / "rank.py").write_text(RANK)
    (run_dir / "run.yaml").write_text("train: {steps: 9}\n")
    running = _submit(here, tmp_path, f"srun {sys.executable} {tmp_path}/rank.py; echo step ended with $?")
    waiting = _submit(here, tmp_path, "sleep 60", f"--dependency=afterany:{running}")
    joblog.append(run_dir, "submitted", jobs=[running, waiting], chain="afterany", links=2, first_link=1, site="test")
    log = tmp_path / f"{running}.log"
    _until(lambda: log.exists() and "begun" in log.read_text())
    assert [job["state"] for job in status(run_dir)["jobs"]] == ["RUNNING", "PENDING"]

    done = cancel(run_dir)

    assert done == {"cancelled": [waiting], "signalled": [running], "killed": [], "left": []}
    assert status(run_dir)["state"] == "cancelling"
    _until(lambda: "step ended with 10" in log.read_text())
    assert "saved" in log.read_text()
    assert queue.job_states([waiting]).get(waiting) is None or queue.job_states([waiting])[waiting].over
    assert [record["kind"] for record in joblog.read(run_dir)] == ["submitted", "cancelled"]


def test_a_controller_that_is_away_is_asked_for_a_while_and_no_longer(
    here: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = Path(here.environment["SLURM_CONF"]).read_text().splitlines()
    away = ["SlurmctldPort=1" if line.startswith("SlurmctldPort=") else line for line in configuration]
    (tmp_path / "slurm.conf").write_text("\n".join(away) + "\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    (tmp_path / "run.yaml").write_text("train: {steps: 9}\n")
    joblog.append(tmp_path, "submitted", jobs=["17"], chain="requeue", links=1, first_link=1, site="test")
    started = time.monotonic()

    answer = status(tmp_path, patience=1.0)

    assert time.monotonic() - started < 4.0
    assert "did not answer" in answer["warnings"][0]
    assert answer["jobs"] == [{"id": "17", "state": "UNKNOWN"}]
    assert (answer["state"], answer["steps"]) == ("unknown", 9)


def test_a_program_that_is_killed_with_its_job_is_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "sinfo"
    program.write_text(f"#!/bin/bash\n[ -e {tmp_path}/again ] && echo batch && exit\n> {tmp_path}/again\nkill $$\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert queue.partitions(patience=5.0) == ["batch"]


def test_without_slurm_the_error_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not queue.available()
    assert queue.job_states([]) == {}
    with pytest.raises(queue.QueueError, match="no squeue found: run this where SLURM is"):
        queue.job_states(["1"])


@pytest.mark.parametrize(
    ("hostlist", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7],x1", ["n1", "n2", "n3", "n7", "x1"]),
        ("frontier[00098-00101]", ["frontier00098", "frontier00099", "frontier00100", "frontier00101"]),
        ("a[01-02]b[1-2],c", ["a01b1", "a01b2", "a02b1", "a02b2", "c"]),
        ("x1000c0s[0,2]b1n0", ["x1000c0s0b1n0", "x1000c0s2b1n0"]),
        ("", []),
    ],
)
def test_lists_of_nodes_are_spelled_out(hostlist: str, names: list[str]) -> None:
    assert queue.expand(hostlist) == names


@pytest.mark.parametrize("hostlist", ["n[1-", "n[a-b]", ",", "n1]", "n1,,n2", "(Resources) x"])
def test_what_is_no_list_of_nodes_is_refused(hostlist: str) -> None:
    with pytest.raises(queue.QueueError, match="no list of nodes"):
        queue.expand(hostlist)


def test_nodes_that_cannot_be_worked_with_are_told_from_busy_ones() -> None:
    busy = ("idle", "allocated", "mixed", "completing", "reserved", "planned")
    bad = ("down", "down*", "drained", "draining", "fail", "idle*", "mixed*", "drained*", "unknown")
    assert not any(map(queue.lost, busy))
    assert all(map(queue.lost, bad))


def test_a_local_job_is_a_process_of_ours_that_still_runs() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "submitit"])
    own = str(process.pid)
    try:
        _until(lambda: own in queue.local_jobs([own, str(os.getpid()), "4000000000"]))
        job = queue.local_jobs([own])[own]
        assert (job.state, job.over) == ("RUNNING", False)
        assert abs((job.start or 0.0) - time.time()) < 30
        # Alive, but somebody else's: a job's number may be given to another process after its end.
        assert queue.local_jobs([own], mark="something else") == {}
        process.send_signal(signal.SIGKILL)
        _until(lambda: queue.local_jobs([own]) == {})
    finally:
        process.kill()
        process.wait()
