import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from monitoring.crashes.report import write_crash_report
from monitoring.runlog import RunLog, RunLogError
from rookery.status import describe
from slurm import joblog
from slurm.cancel import CancelError, cancel
from slurm.quarantine import quarantine
from slurm.status import find_runs, status, unfinished_jobs

NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the run directory speaks, also on a machine where SLURM is installed."""
    monkeypatch.setattr("slurm.queue.available", lambda: False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "demo"
    path.mkdir(parents=True)
    (path / "run.yaml").write_text("train:\n  steps: 20\n")
    return path


def _train(run: Path, first: int, last: int, begin: float, code: int | None) -> None:
    """Log an attempt that took 10 s for every step, after 30 s of starting up."""
    log = RunLog.open(run)
    for step in range(first, last + 1):
        seconds = {"time": begin + 30.0 + 10.0 * (step - first + 1), "seconds": 10.0}
        log.step({"step": step, "tokens": step * 1000, "loss": 9.0 - step / 10, "tokens_per_second": 100.0, **seconds})
    log.close()
    if code is not None:
        outcome = {"exit_code": code, "reason": "why", "time": begin + 30.0 + 10.0 * (last - first + 1)}
        (log.attempt_dir / "outcome.json").write_text(json.dumps(outcome))


def _append(run: Path, kind: str, when: float, **fields: Any) -> None:
    joblog.append_line(run / "jobs.jsonl", {"time": when, "kind": kind} | fields)


def _two_launches(run: Path) -> None:
    """Two links of three: the first died at step 6 with its node, the second goes on from step 4."""
    _append(run, "submitted", NOW - 900, jobs=["7", "8", "9"], chain="afterany", links=3, first_link=1, site="frontier")
    _append(run, "began", NOW - 800, job="7", restart=0, nodes=["n1"], node_count=1)
    _append(run, "launched", NOW - 800, job="7", launch=1, nodes=["n1"], attempts=0, log="jobs/7/1")
    _train(run, 1, 6, NOW - 800, None)
    _append(run, "ended", NOW - 700, job="7", launch=1, status=137, code=None, attempt=1, reason="killed")
    quarantine(run, "n1", "down after job 7", "7")
    _append(run, "began", NOW - 150, job="8", restart=0, nodes=["n2"], node_count=1)
    _append(run, "launched", NOW - 150, job="8", launch=1, nodes=["n2"], attempts=1, log="jobs/8/1")
    _train(run, 5, 14, NOW - 150, None)


def test_a_chain_is_told_from_the_run_directory_alone(run: Path) -> None:
    _two_launches(run)
    answer = status(run, NOW)

    assert (answer["state"], answer["site"]) == ("running", "frontier")
    assert answer["chain"] == {"kind": "afterany", "links": 3, "used": 2}
    assert [job["id"] for job in answer["jobs"]] == ["8", "9"]
    first, second = answer["attempts"]
    assert (first["steps"], first["job"], first["nodes"], first["log"]) == ([1, 6], "7", ["n1"], "jobs/7/1")
    assert first["ending"].startswith("ended without a word")
    assert (second["steps"], second["job"], second["ending"], second["end"]) == ([5, 14], "8", "running", None)
    assert (answer["step"], answer["steps"], answer["tokens"], answer["loss"]) == (14, 20, 14000, 9.0 - 1.4)
    assert answer["tokens_per_second"] == pytest.approx(100.0)
    assert answer["seconds_left"] == pytest.approx(60.0)
    # 14 steps of 10 s, of which two were done twice; each launch began with 30 s, and the first ended with 10 s.
    parts = {"productive": 140, "replayed": 20, "start_up": 60, "lost": 10, "checkpoint": 0, "evaluation": 0, "idle": 0}
    assert answer["ledger"] == pytest.approx(parts | {"total": 230, "share": 140 / 230})
    assert answer["over"] is None
    assert json.loads(json.dumps(answer)) == answer

    text = "\n".join(describe(answer, NOW))
    assert f"{run}: running - frontier, 2 of 3 links begun (afterany)" in text
    assert "step 14 of 20 (70.0%)  14,000 tokens  loss 7.6000" in text
    assert "goodput 61%" in text
    assert "4 min: 61% productive, 26% start-up, 9% replayed, 4% lost" in text
    assert "n1: down after job 7" in status_text(run)


def status_text(run: Path) -> str:
    return "\n".join(describe(status(run), time.time()))


def test_an_old_verdict_about_a_node_is_not_shown(run: Path) -> None:
    quarantine(run, "n1", "slow", "7")
    assert status(run)["quarantine"] == {"n1": "slow"}
    assert status(run, time.time() + 73 * 3600)["quarantine"] == {}


@pytest.mark.parametrize(
    ("code", "state"), [(0, "finished"), (10, "stopped"), (11, "diverged"), (12, "refused"), (1, "failed")]
)
def test_a_run_that_was_started_by_hand_is_told_by_its_outcome(run: Path, code: int, state: str) -> None:
    _train(run, 1, 20, NOW - 500, code)
    answer = status(run, NOW)
    assert (answer["state"], answer["chain"], answer["jobs"], answer["warnings"]) == (state, None, [], [])
    assert answer["attempts"][0]["code"] == code


def test_a_silent_attempt_has_ended_and_one_with_a_heartbeat_runs(run: Path) -> None:
    _train(run, 1, 2, NOW - 5000, None)
    assert status(run, NOW)["state"] == "ended"
    crash = status(run, NOW)["attempts"][0]["crash"]  # which nobody has written down as long as there is no next start
    assert (crash["summary"], crash["path"]) == ("unknown: ended without a word: killed, or its node died", None)
    heartbeat = {"time": NOW - 10, "step": 2, "phase": "forward"}
    (run / "attempts/0001/heartbeat.json").write_text(json.dumps(heartbeat))
    assert status(run, NOW)["state"] == "running"


def test_the_newest_failure_is_told_with_its_report(run: Path) -> None:
    _two_launches(run)
    [failed, healthy] = status(run, NOW)["attempts"]
    assert (failed["crash"], healthy["crash"]) == (None, None)  # the next start, or the link, will have written it
    path = write_crash_report(run, 1)
    answer = status(run, NOW)
    assert answer["attempts"][0]["crash"] == {
        "class": "killed",
        "kind": "SIGKILL",
        "summary": "killed (SIGKILL)",
        "rank": None,
        "host": None,
        "path": str(path),
    }
    text = "\n".join(describe(answer, NOW))
    assert f"attempt 1: killed (SIGKILL)\n{'':<14}{path}" in text


def test_an_attempt_does_not_outlive_its_job(run: Path) -> None:
    _two_launches(run)
    (run / "site.yaml").write_text("scheduler: local\n")
    assert status(run, NOW)["attempts"][-1]["ending"].startswith("ended without a word")  # no process of ours is 8


@pytest.mark.parametrize(("cancelled", "state"), [(False, "diverged"), (True, "cancelled")])
def test_a_chain_that_is_over_says_why(run: Path, cancelled: bool, state: str) -> None:
    _two_launches(run)
    if cancelled:
        _append(run, "cancelled", NOW, by="me")
    _append(run, "over", NOW, code=11, reason="loss is not a number at step 14")
    answer = status(run, NOW)
    assert answer["over"] == {"code": 11, "reason": "loss is not a number at step 14"}
    assert (answer["state"], answer["cancelled"]) == (state, cancelled)


def test_a_submission_that_has_not_begun_has_no_steps(run: Path) -> None:
    _append(run, "submitted", NOW, jobs=["7"], chain="requeue", links=4, first_link=1, site="lumi")
    answer = status(run, NOW)
    assert (answer["state"], answer["step"], answer["ledger"]["share"]) == ("unknown", None, None)
    assert "no step yet, of 20" in "\n".join(describe(answer, NOW))


def test_what_a_link_could_not_do_beside_the_training_is_a_warning(run: Path) -> None:
    _append(run, "submitted", NOW, jobs=["7"], chain="requeue", links=4, first_link=1, site="lumi")
    _append(run, "evaluation", NOW, job="7", step=10, evaluation_job=None, problem="no account")
    _append(run, "evaluation", NOW, job="7", step=20, evaluation_job="8", problem=None)
    warnings = status(run, NOW, queue_answers=False)["warnings"]
    assert [text for text in warnings if "evaluated" in text] == ["step 10 is not evaluated: no account"]


def test_an_attempt_that_has_gone_back_stands_where_it_began(run: Path) -> None:
    _train(run, 1, 9, NOW - 500, 10)
    log = RunLog.open(run)
    log.event("start", step=4)
    log.close()
    assert status(run, NOW)["step"] == 4


def test_only_jobs_that_may_still_run_are_asked_for() -> None:
    chain: list[dict[str, Any]] = [{"kind": "submitted", "jobs": ["1", "2", "3", "4"]}, {"kind": "began", "job": "1"}]
    assert unfinished_jobs(chain) == ["1", "2", "3", "4"]
    assert unfinished_jobs([*chain, {"kind": "began", "job": "2"}]) == ["2", "3", "4"]
    assert unfinished_jobs([]) == []


def test_runs_are_found_below_a_directory_and_in_sweeps(run: Path) -> None:
    element = run.parent / "sweep" / "seed=1"
    element.mkdir(parents=True)
    (element / "run.yaml").touch()
    (run.parent / "notes").mkdir()
    assert find_runs(run.parent) == [run, element]
    assert find_runs(run.parent / "nowhere") == []


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match="no run directory"):
        status(tmp_path)
    with pytest.raises(CancelError, match="is no run directory"):
        cancel(tmp_path)


def test_a_local_run_of_another_machine_is_not_touched(run: Path) -> None:
    (run / "site.yaml").write_text("scheduler: local\n")
    _append(run, "submitted", NOW, jobs=["1"], chain="requeue", links=1, first_link=1, host="elsewhere")
    with pytest.raises(CancelError, match="runs on elsewhere; type this there"):
        cancel(run)
    assert "process of elsewhere" in status(run)["warnings"][0]


def test_cancelling_what_has_ended_does_nothing(run: Path) -> None:
    _train(run, 1, 2, NOW, 0)
    assert cancel(run) == {"cancelled": [], "signalled": [], "killed": [], "left": []}
    assert not (run / "jobs.jsonl").exists()


def test_a_login_node_gets_its_answer_without_torch(run: Path) -> None:
    _two_launches(run)
    code = (
        "import sys; from pathlib import Path; import rookery.status; from slurm.status import status;"
        f"status(Path({str(run)!r})); print([name for name in ('torch', 'zarr', 'submitit') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
