"""Submission: what is refused, what is written, and what a real queue gets. No test here trains."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from submitit.core.utils import FailedJobError
from typer.testing import CliRunner

import rookery.plan
import rookery.submit
from monitoring.runlog import RunLog
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.plan import state_bytes
from slurm import joblog
from slurm.preflight import Options, Prepared, prepare
from slurm.quarantine import quarantine
from slurm.request import JobRequest, RequestError
from slurm.site import Site, SiteError, load_site
from slurm.snapshot import ROOMS, code_digest, write_snapshot
from slurm.steps import node_command, step_environment, train_command
from slurm.submission import SubmissionError, batch_script, make_executor, read_site, refusals, submit, submit_links
from slurm.sweep import combinations, prepare_sweep, submit_sweep
from tests.pipeline.conftest import write_corpus
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
HELD = {"hold": ""}
"""Jobs that stay in the queue until somebody lets them go."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def workdir(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("tokenizer", "data", "test.yaml"):
        (tmp_path / name).symlink_to(corpus / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def queue(workdir: Path, cluster: Cluster, test_site: str, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, reached by this process too; its profile is `test`."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    return cluster


def small_site(**changes: Any) -> Site:
    """A site that we have made up, with a queue that has a limit."""
    return dataclasses.replace(load_site("generic-nvidia"), **{"accelerator": "cpu", "ranks_per_node": 1, **changes})


def prepared(site: str = "test", *overrides: str, **options: Any) -> Prepared:
    wanted: dict[str, Any] = {"nodes": 2, "minutes": 30, "sbatch": HELD, **options}
    return prepare("test.yaml", overrides, load_site(site), Options(**wanted))


def a_request(**changes: Any) -> JobRequest:
    request = JobRequest(
        name="test", run_dir="/RUN", site="test", nodes=2, spares=0, ranks_per_node=4, minutes=30, links=1,
        chain="afterany", partition=None, qos=None, account=None, reservation=None, signal_seconds=60, digest="D",
        stage=[], eval_every=None, eval_depths="1", eval_minutes=30, sbatch={}, command=["-m", "rookery"],
    )  # fmt: skip
    return dataclasses.replace(request, **changes)


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("site", "options", "message"),
    [
        ("frontier", {}, "jobs need an account; give --account NAME"),
        ("frontier", {"account": "A", "nodes": 9473}, "use --nodes 9472"),
        ("frontier", {"account": "A", "minutes": 180}, "use --time 2h"),
        ("frontier", {"account": "A", "qos": "debug", "budget_minutes": 600}, "prohibits chains"),
        ("frontier", {"account": "A", "ranks_per_node": 9}, "use --ranks-per-node 8"),
        ("frontier", {"account": "A", "chain": "afterall"}, "did you mean 'afterany'"),
        (
            "frontier",
            {"account": "A", "sbatch": {"time": "5"}},
            "--sbatch time: is decided by the submission; use --time",
        ),
        ("frontier", {"account": "A", "sbatch": {"core_spec": "0"}}, "core-spec=VALUE"),
        ("frontier", {"account": "A", "stage": [Path("nowhere.tar")]}, "--stage nowhere.tar: no such file"),
        ("frontier", {"account": "A", "eval_every": 0}, "use --eval-every 1"),
        ("juwels-booster", {"account": "A", "stage": [Path("env.tar")]}, "no node-local directory"),
        ("perlmutter", {"account": "m1"}, "use --account m1_g"),
        ("local", {}, "use --nodes 1"),
        ("local", {"nodes": 1, "qos": "debug"}, "--qos: there is no queue here"),
    ],
)
def test_what_the_site_does_not_grant_is_refused(
    workdir: Path, site: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SiteError) as refused:
        prepare("no configuration is read", [], load_site(site), Options(**{"nodes": 2, **options}))
    assert message in str(refused.value)


def test_such_a_refusal_needs_no_torch(workdir: Path) -> None:
    program = (
        "import sys; from rookery.submit import submit\n"
        "try: submit('smoke', 'frontier', nodes=2, time='30m')\n"
        "except ValueError as error: print(error, 'torch' in sys.modules, 'submitit' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "give --account NAME" in done.stdout, done.stderr
    assert done.stdout.endswith(" False False\n")


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (
            ["train.global_batch_size=9"],
            {},
            "9 is not a multiple of 2 ranks x train.micro_batch_size 2; nearest valid value: 8",
        ),
        (["train.stepz=3"], {}, "did you mean 'train.steps'"),
        (["data.train=missing"], {}, "data.train"),
        (["run_dir=a%j"], {}, "run_dir: "),
        (["run_dir=data"], {}, "holds something that is not a run"),
        ([], {"minutes": 3}, "use --time 5m or longer, or a lower margin"),
        ([], {"eval_depths": "banana"}, "not a comma-separated list"),
        ([], {"ranks_per_node": 0}, "use --ranks-per-node 1"),
        ([], {"max_restarts": 10**20}, "use --max-restarts 1000"),
        ([], {"sbatch": {"foo bar": "1"}}, "write --sbatch foo-bar=VALUE"),
        ([], {"reservation": ""}, "--reservation: is empty"),
        (["comm.transport=mpi", "zero.scope=node"], {}, "use comm.transport=collective"),
        ([], {"signal_seconds": 900}, "use --signal-lead 899"),
    ],
)
def test_what_the_ranks_would_refuse_is_refused(
    workdir: Path, overrides: list[str], options: dict[str, Any], message: str
) -> None:
    wanted = Options(**{"nodes": 2, "minutes": 30, **options})
    with pytest.raises((ConfigError, SiteError)) as refused:
        prepare("test.yaml", overrides, small_site(control="torch"), wanted)
    assert message in str(refused.value)
    assert not (workdir / "run").exists()


def test_state_that_no_device_holds_is_refused_and_much_memory_is_a_warning(workdir: Path) -> None:
    options = Options(nodes=2, minutes=30)
    state = state_bytes(load_config("test.yaml"), 2, 2).on_device / 1e9
    with pytest.raises(ConfigError, match=r"zero\.stage: weights, gradients and optimizer state take"):
        prepare("test.yaml", [], small_site(device_memory_gb=state * 0.99), options)
    tight = prepare("test.yaml", [], small_site(device_memory_gb=state * 1.0001), options)
    assert any("train.activation_checkpointing" in text for text in tight.warnings), tight.warnings
    roomy = prepare("test.yaml", [], small_site(device_memory_gb=state * 2), options)
    assert not any("train.activation_checkpointing" in text for text in roomy.warnings)


def test_a_site_speaks_below_the_file_and_the_command_line(workdir: Path) -> None:
    site = small_site(overrides={"comm.port": 20074, "checkpoint.every": 7})
    options = Options(nodes=2, minutes=30)
    config = prepare("test.yaml", [], site, options).config
    assert (config.comm.port, config.checkpoint.every) == (20074, 4)
    assert prepare("test.yaml", ["comm.port=3442"], site, options).config.comm.port == 3442


def test_the_warning_comes_three_saves_before_the_end(workdir: Path) -> None:
    site, options = small_site(signal_seconds=60), Options(nodes=2, minutes=30)
    assert prepare("test.yaml", [], site, options).request.signal_seconds == 60
    log = RunLog.open(workdir / "run")
    log.event("checkpoint", tier="shared", path="step-00000004", seconds=200.0)
    log.close()
    assert prepare("test.yaml", [], site, options).request.signal_seconds == 601
    with pytest.raises(SiteError, match="use --time 21m or longer"):
        prepare("test.yaml", [], site, Options(nodes=2, minutes=20))
    with pytest.raises(SiteError, match="use --signal-lead 601"):
        prepare("test.yaml", [], site, Options(nodes=2, minutes=30, signal_seconds=100))


def test_variables_that_would_overrule_the_command_line_are_named(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1")
    warnings = prepare("test.yaml", [], small_site(), Options(nodes=2, minutes=30)).warnings
    assert "SBATCH_TIMELIMIT: set here, but jobs follow the options of this command alone" in warnings


def test_a_dry_run_shows_the_script_and_writes_nothing(workdir: Path) -> None:
    app = typer.Typer()
    app.command()(rookery.submit.submit)
    arguments = ["test.yaml", "--site", "frontier", "--nodes", "2", "--account", "A", "--time", "1h", "--dry-run"]
    arguments += ["train.global_batch_size=64", "--sbatch", "exclusive"]
    before = sorted(workdir.iterdir())
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "#SBATCH --account=A\n" in shown.stdout
    assert "#SBATCH --exclusive\n" in shown.stdout
    assert "srun --nodes=2 " in shown.stderr
    assert sorted(workdir.iterdir()) == before
    CliRunner().invoke(app, [*arguments, "--out", "script.sh", "--json"], catch_exceptions=False)
    assert (workdir / "script.sh").read_text() == shown.stdout


def test_a_plan_for_a_site_takes_its_ranks_memory_and_queue(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()
    app.command()(rookery.plan.plan)
    shallow = ["depth.mean_recurrence=1", "depth.mean_backprop_depth=1"]  # quick to trace
    arguments = ["test.yaml", "train.global_batch_size=64", *shallow, "--site", "frontier", "--nodes", "2"]
    plan = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert (plan["ranks"], plan["ranks_per_node"], plan["memory_gb"]) == (16, 8, load_site("frontier").device_memory_gb)
    assert (plan["site"]["partition"], plan["site"]["minutes"]) == ("batch", 120)
    assert plan["site"]["hours_of_the_run_at_peak"] == plan["site"]["seconds_of_a_step_at_peak"] * 12 / 3600
    rookery.plan._print(plan)
    assert "2h in batch" in capsys.readouterr().out
    with pytest.raises(ValueError, match="use --nodes 9472"):
        CliRunner().invoke(app, [*arguments, "--nodes", "9999"], catch_exceptions=False)
    with pytest.raises(ValueError, match="--ranks 3: follows from --site"):
        CliRunner().invoke(app, [*arguments, "--ranks", "3"], catch_exceptions=False)


@pytest.mark.parametrize(("chain", "jobs"), [("requeue", 1), ("afterany", 2), ("array", 2)])
def test_the_queue_gets_the_script_that_a_dry_run_shows(queue: Cluster, chain: str, jobs: int) -> None:
    run = prepared(chain=chain, budget_minutes=60, spares=1, account="someone")
    ids = submit(run)
    run_dir = Path(run.request.run_dir)
    first = ids[0].split("_")[0]
    assert (run_dir / f"jobs/{first}_submission.sh").read_text() == batch_script(run.site, run.request)
    assert len(ids) == jobs
    listed = queue.sh("squeue", "--array", "--noheader", "--format=%i|%D|%l|%E|%k|%a").splitlines()
    dependency = dict.fromkeys(ids, "(null)")
    if chain == "afterany":
        dependency[ids[1]] = f"afterany:{ids[0]}(unfulfilled)"
    assert sorted(listed) == [f"{id_}|3|30:00|{dependency[id_]}|{run_dir}|someone" for id_ in sorted(ids)]
    opening, *others = joblog.read(run_dir)
    assert (opening["kind"], opening["jobs"], opening["links"], opening["first_link"]) == ("submitted", [], 2, 1)
    assert [id_ for record in others for id_ in record["jobs"]] == ids
    assert joblog.current_chain([opening, *others]) == [opening, *others]
    assert JobRequest.read(run_dir) == run.request
    assert read_site(run_dir) == run.site
    with pytest.raises(SiteError, match=f"is active already in job {ids[0]}"):
        prepared()


def test_links_go_on_where_others_stopped(queue: Cluster) -> None:
    run = prepared(chain="afterany", budget_minutes=90)
    submit(run)
    run_dir = Path(run.request.run_dir)
    (last,) = submit_links(run_dir, 3, ["elsewhere", "n2"], continues=True)
    assert "ExcNodeList=n2" in queue.sh("scontrol", "show", "job", last)
    assert joblog.read(run_dir)[-1]["continues"]
    assert joblog.read(run_dir)[-1]["first_link"] == 3


def test_every_link_waits_for_all_before_it(queue: Cluster) -> None:
    one, two, three = submit(prepared(chain="afterany", budget_minutes=90, sbatch={"begin": "now+1hour"}))
    queue.sh("scancel", two)
    listed = queue.sh("squeue", "--noheader", f"--jobs={three}", "--format=%T %E").strip()
    assert listed.startswith(f"PENDING afterany:{one}(unfulfilled)")


def test_a_list_of_nodes_that_slurm_refuses_does_not_end_a_chain(
    queue: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "bin/sinfo"
    silent.parent.mkdir()
    silent.write_text("#!/bin/bash\necho refused >&2; exit 1\n")
    silent.chmod(0o755)
    monkeypatch.setenv("PATH", f"{silent.parent}:{os.environ['PATH']}")
    run = prepared()
    Path(run.request.run_dir).mkdir()
    quarantine(Path(run.request.run_dir), "elsewhere", "of another cluster", "7")
    (job,) = submit(run)
    assert "ExcNodeList=(null)" in queue.sh("scontrol", "show", "job", job)


def test_neither_variables_nor_the_job_around_us_change_a_job(queue: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SBATCH_TIMELIMIT": "1", "SBATCH_PARTITION": "low", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    (job,) = submit(prepared())
    assert queue.sh("squeue", "--noheader", f"--jobs={job}", "--format=%l %P").split() == ["30:00", "batch"]
    assert os.environ["SLURM_JOB_ID"] == "7"


def test_slurm_says_why_it_refuses(queue: Cluster) -> None:
    with pytest.raises(SubmissionError, match=r"test: SLURM refuses the job: .*Invalid feature specification"):
        submit(prepared(sbatch={"constraint": "nowhere"}))
    assert queue.sh("squeue", "--noheader") == ""
    opening, over = joblog.read(Path("run"))
    assert (opening["kind"], over["kind"], over["code"]) == ("submitted", "over", 12)
    assert "Invalid feature specification" in over["reason"]


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("Unable to contact slurm controller (connect failure)", "wait until its controller answers"),
        ("Invalid account or account/partition combination specified", "change what it names"),
    ],
)
def test_a_refusal_says_whether_to_wait(said: str, advice: str) -> None:
    with pytest.raises(SubmissionError, match=advice), refusals("test"):
        raise FailedJobError(f"sbatch: error: {said}")


def test_a_chain_that_the_queue_does_not_take_whole_leaves_nothing(
    queue: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = next(Path(folder, "sbatch") for folder in os.environ["PATH"].split(":") if Path(folder, "sbatch").exists())
    limited = tmp_path / "bin/sbatch"
    limited.parent.mkdir()
    limited.write_text(
        f'#!/bin/bash\n[ "$(squeue --noheader | wc -l)" -lt 2 ] && exec {real} "$@"\n'
        "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1\n"
    )
    limited.chmod(limited.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{limited.parent}:{os.environ['PATH']}")
    with pytest.raises(SubmissionError, match=r"took 2 of 3 links.*QOSMaxSubmitJobPerUserLimit.*use --budget 1h"):
        submit(prepared(chain="afterany", budget_minutes=90))
    wait_for(lambda: queue.sh("squeue", "--noheader") == "")
    # Closed, and each job written down before the next: the first may have begun meanwhile.
    records = joblog.read(Path("run"))
    assert [(record["kind"], len(record.get("jobs", []))) for record in records] == [
        *(("submitted", number) for number in (0, 1, 1)),
        ("over", 0),
    ]


def test_a_job_runs_on_the_snapshot_in_the_run_directory(queue: Cluster) -> None:
    run = prepared(sbatch={})
    submitted = dataclasses.replace(run.request, links=1)
    run_dir = Path(submitted.run_dir)
    code = write_snapshot(run_dir)
    executor = make_executor(run.site, submitted)
    job = executor.submit(os.system, f"pwd; {sys.executable} -c 'import slurm, os; print(slurm.__file__)'; ulimit -c")
    log = run_dir / f"jobs/{job.job_id}_0_log.out"
    wait_for(lambda: log.exists() and "completed" in log.read_text())
    assert f"{run_dir}\n{code}/slurm/__init__.py\n0\n" in log.read_text()


def test_a_job_of_this_machine_keeps_its_devices_and_outlives_its_terminal(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    run = prepare("test.yaml", [], load_site("local"), Options(nodes=1, ranks_per_node=2, minutes=5))
    assert run.request.command[-1] == "control.time_limit_minutes=5"
    run_dir = Path(run.request.run_dir)
    write_snapshot(run_dir)
    (run_dir / "jobs").mkdir()
    job = make_executor(run.site, run.request).submit(
        os.system, "echo $CUDA_VISIBLE_DEVICES $SUBMITIT_LOCAL_JOB_ID; pwd; grep SigIgn /proc/self/status"
    )
    log = run_dir / f"jobs/{job.job_id}_0_log.out"
    wait_for(lambda: log.exists() and "completed" in log.read_text())
    said = log.read_text()
    assert f"0,1 {job.job_id}\n{run_dir}\n" in said
    assert int(said.split("SigIgn:")[1].split()[0], 16) & 1  # SIGHUP is signal 1


def test_a_snapshot_is_the_six_packages_whole(tmp_path: Path) -> None:
    code = write_snapshot(tmp_path)
    assert code == tmp_path / "code" / code_digest()
    assert sorted(path.name for path in code.iterdir()) == list(ROOMS)
    for kept in ("pipeline/configs/runs/smoke.yaml", "slurm/sites/frontier.yaml", "rookery/__main__.py"):
        assert (code / kept).read_bytes() == (ROOT / kept).read_bytes()
    assert not list(code.rglob("*.pyc"))
    written = (code / "slurm/__init__.py").stat().st_mtime_ns
    assert write_snapshot(tmp_path) == code
    assert (code / "slurm/__init__.py").stat().st_mtime_ns == written
    assert [path.name for path in (tmp_path / "code").iterdir()] == [code.name]


def test_a_request_is_read_as_it_was_written(tmp_path: Path) -> None:
    request = a_request(sbatch={"mail-type": "END"}, stage=["/env.tar"], eval_every=2)
    request.write(tmp_path)
    assert JobRequest.read(tmp_path) == request


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda record: record.pop("nodes"), "the keys nodes are missing"),
        (lambda record: record.update(links="3"), "links is '3'"),
        (lambda record: record.update(nodes=True), "nodes is True"),
    ],
)
def test_a_damaged_request_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, object]], object], message: str
) -> None:
    a_request().write(tmp_path)
    record = json.loads((tmp_path / "job.json").read_text())
    damage(record)
    (tmp_path / "job.json").write_text(json.dumps(record))
    with pytest.raises(RequestError, match=message):
        JobRequest.read(tmp_path)
    (tmp_path / "job.json").unlink()
    with pytest.raises(RequestError, match="was not started by `rookery submit`"):
        JobRequest.read(tmp_path)


def test_a_step_runs_on_the_nodes_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = dataclasses.replace(load_site("lumi"), python="singularity exec $IMAGE python", control="torch")
    monkeypatch.setenv("IMAGE", "/images/a b.sif".replace(" ", "_"))
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    command = train_command(site, a_request(), ["n2", "n3"], tmp_path, None)
    assert command[:5] == ["srun", "--nodes=2", "--nodelist=n2,n3", "--ntasks=8", "--ntasks-per-node=4"]
    assert f"--cpu-bind=mask_cpu:{','.join(site.binding.cpu_masks[:4])}" in command
    assert command[-6:] == ["singularity", "exec", "/images/a_b.sif", "python", "-m", "rookery"]
    assert train_command(site, a_request(), ["n2"], tmp_path, "/nvme/env/bin/python")[-3:-2] == ["/nvme/env/bin/python"]
    environment = step_environment(site, a_request(), ["n2", "n3"])
    assert (environment["ROOKERY_CONTROL"], environment["MASTER_ADDR"]) == ("torch", "n2")
    assert "MASTER_ADDR" not in step_environment(site, a_request(), ["n1", "n3"])
    assert node_command(site, a_request(), ["n2"], ["true"])[-1] == "true"


def test_a_grid_is_the_product_of_its_axes() -> None:
    assert combinations(["a.b=1,2", "c=[1,2],[3]"]) == [
        ["a.b=1", "c=[1,2]"], ["a.b=1", "c=[3]"], ["a.b=2", "c=[1,2]"], ["a.b=2", "c=[3]"],
    ]  # fmt: skip
    for wrong, message in (([], "needs at least one"), (["a"], "key=value"), (["a=1,1"], "twice"), (["a=1,"], "key=")):
        with pytest.raises(SiteError, match=message):
            combinations(wrong)


def test_a_sweep_is_one_array_of_runs(queue: Cluster) -> None:
    options = Options(nodes=1, minutes=30, sbatch=HELD)
    grid = ["optimizer.learning_rate=1e-3,2e-3", "depth.mean_recurrence=2,4"]
    folder, runs = prepare_sweep("test.yaml", ["seed=5"], grid, load_site("test"), options)
    assert not folder.exists()
    (Path(runs[3].request.run_dir) / "code/older").mkdir(parents=True)  # it was submitted by itself before
    jobs = submit_sweep(folder, runs, parallel=3)
    assert {job.split("_")[1] for job in jobs} == {"0", "1", "2", "3"}
    assert "ArrayTaskThrottle=3" in queue.sh("scontrol", "show", "job", jobs[0].split("_")[0])
    last = folder / "optimizer.learning_rate=2e-3,depth.mean_recurrence=4"
    assert runs[3].request.run_dir == str(last)
    assert (runs[3].config.seed, runs[3].config.optimizer.learning_rate) == (5, 2e-3)
    assert [record["jobs"] for record in joblog.current_chain(joblog.read(last))] == [[], [jobs[3]]]
    assert (last / "code" / runs[3].request.digest / "slurm").is_dir()
    assert (Path(runs[0].request.run_dir) / "code").readlink() == Path("../code")
    with pytest.raises(SiteError, match="is active already"):
        prepare_sweep("test.yaml", ["seed=5"], grid, load_site("test"), options)
    with pytest.raises(SiteError, match="go on by --chain requeue alone"):
        prepare_sweep(
            "test.yaml",
            ["seed=5", "run_dir=other"],
            grid,
            load_site("test"),
            dataclasses.replace(options, budget_minutes=60),
        )


def test_one_wrong_run_of_a_sweep_keeps_all_from_the_queue(workdir: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size: 7"):
        prepare_sweep("test.yaml", [], ["train.global_batch_size=8,7"], small_site(), Options(nodes=1, minutes=30))
    assert not (workdir / "run").exists()
