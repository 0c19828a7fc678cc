"""Jobs of a run handed to the queue through Submitit: what their batch script says, and the links of a chain.

A job of SLURM runs one process on its first node: Submitit, which calls the `Link` of the run directory. The ranks are
tasks of the `srun` that this link starts, not of Submitit: its own handlers let rank 0 alone save and requeue.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from monitoring.runlog import write_atomic
from pipeline.errors import ExitCode
from slurm import joblog
from slurm.limits import NO_LIMIT_MINUTES, show_duration
from slurm.queue import AWAY
from slurm.request import JobRequest
from slurm.site import Site, Variable, site_from_record, site_to_yaml
from slurm.snapshot import FOLDER as CODE

if TYPE_CHECKING:
    from submitit import AutoExecutor

    from slurm.preflight import Prepared

JOBS = "jobs"
SITE = "site.yaml"
RUN = "run.yaml"
_FLAGS = ("", "true")
_SET_BY_SITES = ("SLURM_CONF", "SLURM_MPI_TYPE")


class SubmissionError(ValueError):
    """The queue does not take a job; the message says why and what to do."""


def make_executor(
    site: Site, request: JobRequest, *, exclude: Sequence[str] = (), dependency: str | None = None
) -> AutoExecutor:
    """Return what submits jobs of a run, with every parameter set.

    Args:
        site: where.
        request: what.
        exclude: nodes that the job must not get.
        dependency: on other jobs, as `sbatch --dependency` takes it.

    Raises:
        SubmissionError: there is no SLURM here.
    """
    from submitit import AutoExecutor

    folder = Path(request.run_dir) / JOBS
    if site.scheduler == "local":
        executor = AutoExecutor(folder, cluster="local")
        executor.update_parameters(
            timeout_min=NO_LIMIT_MINUTES,
            tasks_per_node=1,
            stderr_to_stdout=True,
            local_setup=_local_setup(site, request),
        )
        return executor
    try:
        executor = AutoExecutor(folder, cluster="slurm")
    except RuntimeError:
        raise SubmissionError(
            f"site {site.name}: no srun and sbatch found; submit on a login node, or add --dry-run to see the script"
        ) from None
    parameters = _parameters(site, request, exclude, dependency)
    executor.update_parameters(**{f"slurm_{key}": value for key, value in parameters.items()})
    # Sites that keep accounts by wckey refuse Submitit's own; AutoExecutor takes None for "not set".
    executor.parameters["wckey"] = None
    return executor


def batch_script(site: Site, request: JobRequest, *, exclude: Sequence[str] = ()) -> str:
    """Return the text that `sbatch` gets for the first link of a run, letter by letter; needs no SLURM.

    At a site without SLURM it is the shell line that starts the job.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    folder = Path(request.run_dir) / JOBS
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    if site.scheduler == "local":
        return " && \\\n".join([*_local_setup(site, request), command]) + "\n"
    parameters = _parameters(site, request, exclude, None)
    if request.chain == "array" and request.links > 1:
        parameters["map_count"] = request.links
    return _make_sbatch_string(command=command, folder=folder, wckey=None, **parameters)  # type: ignore[arg-type]


def submit(prepared: Prepared) -> list[str]:
    """Write the run directory of a run that may be submitted, submit its links, and return their job ids.

    Raises:
        SubmissionError: the run directory cannot be written, or the queue does not take the jobs.
    """
    from slurm.quarantine import quarantined
    from slurm.snapshot import write_snapshot

    request = prepared.request
    run_dir = Path(request.run_dir)
    with writing(run_dir):
        write_run(prepared)
        write_snapshot(run_dir)
    return submit_links(run_dir, exclude=list(quarantined(run_dir, request.quarantine_hours, time.time())))


def write_run(prepared: Prepared) -> None:
    """Write what the jobs of a run read: `run.yaml`, `site.yaml` and `job.json`."""
    from pipeline.config import to_yaml

    run_dir = Path(prepared.request.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / JOBS).mkdir(exist_ok=True)
    write_atomic(run_dir / RUN, to_yaml(prepared.config).encode())
    write_atomic(run_dir / SITE, site_to_yaml(prepared.site).encode())
    prepared.request.write(run_dir)


def submit_links(
    run_dir: Path, first_link: int = 1, exclude: Sequence[str] = (), *, continues: bool = False
) -> list[str]:
    """Submit the links of a run from `first_link` on, write that down in `jobs.jsonl`, and return their job ids.

    Also for a link on a compute node that has to leave its allocation.

    Args:
        run_dir: holds the request, the site and the code.
        first_link: number of the first, from 1.
        exclude: nodes that they must not get.
        continues: whether they go on with a chain that has begun, instead of starting one.

    Raises:
        RequestError: the run was not prepared for submission.
        SubmissionError: the queue does not take them; nothing stays in it.
    """
    from slurm.quarantine import excludable
    from slurm.queue import scancel

    request, site = JobRequest.read(run_dir), read_site(run_dir)
    assert 1 <= first_link <= request.links, (first_link, request.links)
    if site.scheduler != "local":
        nodes = request.nodes + request.spares
        exclude = excludable(exclude, request.partition, nodes, always_excluded(site, request))
    jobs: list[str] = []
    try:
        with nullcontext() if continues else opened([request]), only_the_script():
            try:
                _submit_into(jobs, site, request, first_link, exclude)
            except SubmissionError as error:
                if jobs or not exclude:
                    raise
                joblog.say(f"{error}; submits again without the nodes to avoid, which links leave aside by themselves")
                _submit_into(jobs, site, request, first_link, ())
    except BaseException:
        scancel(jobs)  # the chain is closed by now: those that have begun do not submit others
        raise
    return jobs


@contextmanager
def opened(requests: Sequence[JobRequest]) -> Iterator[None]:
    """Open the chains of runs for jobs that are submitted within: some begin before the last one is submitted.

    If the submission fails the chains are over.
    """
    for request in requests:
        log_submission(request, [], continues=False)
    try:
        yield
    except BaseException as error:
        reason = f"not submitted: {str(error) or type(error).__name__}"
        for request in requests:
            joblog.append(Path(request.run_dir), "over", code=int(ExitCode.BAD_INPUT), reason=reason)
        raise


def log_submission(request: JobRequest, jobs: Sequence[str], first_link: int = 1, *, continues: bool = True) -> None:
    """Append jobs of a chain, which opens here unless it `continues`, to the run's `jobs.jsonl`."""
    joblog.append(
        Path(request.run_dir),
        "submitted",
        jobs=list(jobs),
        chain=request.chain,
        links=request.links,
        minutes=request.minutes,
        nodes=request.nodes,
        site=request.site,
        digest=request.digest,
        first_link=first_link,
        continues=continues,
        host=socket.gethostname(),  # of jobs that are processes
    )


def read_site(run_dir: Path) -> Site:
    """Return the profile with which a run was submitted.

    Raises:
        SubmissionError: there is none.
        SiteError: it is damaged.
    """
    path = run_dir / SITE
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SubmissionError(f"{path}: cannot be read ({reason}); submit the run again") from None
    return site_from_record(record if isinstance(record, dict) else {}, str(path))


def _submit_into(jobs: list[str], site: Site, request: JobRequest, first_link: int, exclude: Sequence[str]) -> None:
    """Submit the links of a run, each written down at once, and append their ids to `jobs`."""
    links = request.links - first_link + 1
    with refusals(request.name):
        try:
            for ids in _submissions(site, request, links, exclude):
                jobs += ids
                log_submission(request, ids, first_link)
        except Exception as error:
            if not jobs:
                raise
            raise SubmissionError(
                f"{request.name}: the queue took {len(jobs)} of {links} links, which are cancelled, and refused the"
                f" next: {_complaint(error)}; use --budget {show_duration(len(jobs) * request.minutes)}"
            ) from error


def _submissions(site: Site, request: JobRequest, links: int, exclude: Sequence[str]) -> Iterator[list[str]]:
    """Submit the jobs of so many links, and yield their ids as the queue takes them."""
    from slurm.link import Link

    link = Link(Path(request.run_dir))
    if site.scheduler == "local" or request.chain == "requeue":
        yield [make_executor(site, request, exclude=exclude).submit(link).job_id]
    elif request.chain == "array":
        executor = make_executor(site, request, exclude=exclude)
        yield [job.job_id for job in executor.submit_array([link] * links)]
    else:
        before: list[str] = []
        for _ in range(links):
            # After all of them: one that waits may be cancelled while an earlier one runs.
            dependency = f"afterany:{':'.join(before)}" if before else None
            before.append(make_executor(site, request, exclude=exclude, dependency=dependency).submit(link).job_id)
            yield before[-1:]


def always_excluded(site: Site, request: JobRequest) -> list[str]:
    """Return the nodes that the profile, or whoever submitted the run, keeps its jobs off."""
    from slurm.queue import expand

    return expand({**site.sbatch, **request.sbatch}.get("exclude", ""))


def _parameters(
    site: Site, request: JobRequest, exclude: Sequence[str], dependency: str | None
) -> dict[str, str | int | bool | list[str] | dict[str, Any]]:
    """Return the parameters of Submitit's SLURM executor."""
    options: dict[str, Any] = {
        "account": request.account,
        "chdir": request.run_dir,
        "comment": request.run_dir,
        "dependency": dependency,
        "ntasks_per_node": request.ranks_per_node,
        "partition": request.partition,
        "qos": request.qos,
        "reservation": request.reservation,
        # A requeued job keeps its id; links of a chain must not come back beside their successors.
        ("requeue" if request.chain == "requeue" else "no_requeue"): True,
    }
    if request.spares:
        options["no_kill"] = True  # the allocation outlives a node
    if site.binding.mode != "mask":  # masks name cores of the whole node, which a number of cores a task would divide
        options["cpus_per_task"] = site.cores_per_rank
    fixed = dict(site.sbatch)
    if site.node_local is not None and site.node_local.constraint is not None:
        wanted = [fixed.get("constraint"), site.node_local.constraint]
        fixed["constraint"] = "&".join(dict.fromkeys(text for text in wanted if text))
    for key, value in {**fixed, **request.sbatch}.items():
        options[key.replace("-", "_")] = flag_or_text(value)
    listed = [*filter(None, [options.pop("exclude", None)]), *sorted(exclude)]
    options["exclude"] = ",".join(listed) or None
    return {
        "job_name": request.name,
        "nodes": request.nodes + request.spares,
        "time": request.minutes,
        "signal_delay_s": request.signal_seconds,
        "stderr_to_stdout": True,
        "array_parallelism": 1,
        "use_srun": False,
        "setup": _setup(site, request),
        "additional_parameters": {key: value for key, value in options.items() if value is not None},
    }


def _setup(site: Site, request: JobRequest) -> list[str]:
    """Return the lines of the script before its command."""
    lines = [
        "# thousands of core dumps would fill the file system; thousands of ranks meet at one process's sockets",
        "ulimit -c 0",
        'ulimit -n "$(ulimit -Hn)"',
        "# the shell outlives SIGTERM: the link decides what follows from it",
        "trap : TERM",
    ]
    lines += module_lines(site)
    for name, variable in _variables(site, request).items():
        lines += [f"# {_one_line(variable.why)} ({_one_line(variable.source)})", _export(name, variable.value)]
    if site.proxy is not None:
        lines.append("# the compute nodes reach the network through the site's proxy alone")
        lines += [f'export {name}="{site.proxy}"' for name in ("http_proxy", "https_proxy")]
        lines.append("export no_proxy=localhost,127.0.0.1")
    return [*lines, *_own_exports(request)]


def module_lines(site: Site) -> list[str]:
    """Return the lines of a script that make a site's software available."""
    lines = [f"module use {shlex.quote(path)}" for path in site.module_paths]
    if site.modules:
        names = " ".join(map(shlex.quote, site.modules))
        lines.append(f"module load {names} || {{ echo 'rookery: a module cannot be loaded' >&2; exit 1; }}")
    return [*lines, *site.after_modules]


def flag_or_text(value: str) -> str | bool:
    """Return the value of an option of sbatch as Submitit takes it: True for one that is a flag."""
    return True if value in _FLAGS else value


def _variables(site: Site, request: JobRequest) -> dict[str, Variable]:
    by_size = site.env_one_node if request.nodes == 1 else site.env_many_nodes
    variables = {**site.env, **by_size, **site.env_node_local}
    threads = Variable(
        value=str(site.cores_per_rank), why="threads of a rank: the cores it has", source="cores_per_rank"
    )
    return variables if "OMP_NUM_THREADS" in variables else {**variables, "OMP_NUM_THREADS": threads}


def _own_exports(request: JobRequest) -> list[str]:
    code = shlex.quote(str(Path(request.run_dir) / CODE / request.digest))
    return [
        "# the code as it was when the run was submitted, which no rank writes to",
        f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        "export PYTHONDONTWRITEBYTECODE=1",
    ]


def _local_setup(site: Site, request: JobRequest) -> list[str]:
    """Return shell commands, to be joined by `&&`, before Submitit's controller of a job of this machine."""
    log = shlex.quote(str(Path(request.run_dir) / JOBS / "local.log"))
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [
        # Submitit takes the shell's id for the job's. A shell without traps would replace itself by its last command.
        "trap : TERM",
        "trap '' HUP",  # the terminal may be closed
        f"exec </dev/null >>{log} 2>&1",
        f"cd {shlex.quote(request.run_dir)}",
        # Submitit hides all devices unless it is told of some.
        "unset CUDA_VISIBLE_DEVICES" if devices is None else f"export CUDA_VISIBLE_DEVICES={shlex.quote(devices)}",
        *(_export(name, variable.value) for name, variable in {**site.env, **site.env_one_node}.items()),
        *(line for line in _own_exports(request) if not line.startswith("#")),
    ]


def _export(name: str, value: str) -> str:
    """Return the line that sets a variable; the shell expands $NAME and $(command) in it."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`")
    return f'export {name}="{escaped}"'


def _one_line(text: str) -> str:
    return " ".join(text.split())


@contextmanager
def only_the_script() -> Iterator[None]:
    """Hide what would overrule the script: SBATCH_* variables, and the job in which this process runs, if any."""
    from submitit.helpers import clean_env

    inside = "SLURM_JOB_ID" in os.environ
    keep = {name: value for name, value in os.environ.items() if name.startswith("SLURM_") and not inside}
    keep |= {name: os.environ[name] for name in _SET_BY_SITES if name in os.environ}
    with clean_env():
        os.environ.update(keep)
        yield


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Turn a disk that is full, or not ours, into a refusal."""
    try:
        yield
    except OSError as error:
        raise SubmissionError(
            f"{run_dir}: cannot be written ({error.strerror or error}); make room or set run_dir to another directory"
        ) from error


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """Turn Submitit's report of a refused job into ours."""
    from submitit.core.utils import FailedJobError

    try:
        yield
    except FailedJobError as error:
        complaint = _complaint(error)
        advice = "wait until its controller answers" if AWAY.search(complaint) else "change what it names"
        raise SubmissionError(f"{name}: SLURM refuses the job: {complaint}; {advice} and submit again") from None


def _complaint(error: Exception) -> str:
    """Return what sbatch complains of, without the command line that Submitit puts around it."""
    lines = [line for line in str(error).splitlines() if "sbatch: error:" in line]
    return " ".join(" ".join(lines or [str(error)]).replace("sbatch: error:", "").split())
