"""A grid of overrides as one array of jobs: every combination is a run of its own."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from slurm.limits import show_duration
from slurm.preflight import Options, Prepared, prepare
from slurm.site import Site, SiteError
from slurm.snapshot import FOLDER as CODE
from slurm.snapshot import write_snapshot
from slurm.submission import (
    SubmissionError,
    log_submission,
    make_executor,
    only_the_script,
    opened,
    refusals,
    write_run,
    writing,
)

# Commas within brackets belong to the value.
_COMMA = re.compile(r",(?![^\[{]*[\]}])")
_LONGEST_NAME = 200


def combinations(grid: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every run of a grid, the last key varying fastest.

    Args:
        grid: `dotted.key=value,value,...` each.

    Raises:
        SiteError: an axis without values, or one that is there twice.
    """
    axes, keys = [], set()
    for axis in grid:
        key, separator, values = axis.partition("=")
        words = [word.strip() for word in _COMMA.split(values)]
        if not separator or not key or not all(words):
            raise SiteError(f"--grid {axis!r}: is not of the form key=value,value,...")
        if key in keys or len(set(words)) < len(words):
            raise SiteError(f"--grid {axis!r}: a key or a value is there twice; take it out")
        keys.add(key)
        axes.append([f"{key}={word}" for word in words])
    if not axes:
        raise SiteError("--grid: a sweep needs at least one, such as --grid optimizer.learning_rate=1e-4,3e-4")
    return [list(combination) for combination in itertools.product(*axes)]


def prepare_sweep(
    source: str, overrides: Sequence[str], grid: Sequence[str], site: Site, options: Options
) -> tuple[Path, list[Prepared]]:
    """Return the directory of a sweep and its runs, each as `prepare` decides it; writes nothing.

    Raises:
        SiteError, ConfigError: as `prepare`, or the runs cannot be an array.
    """
    overrides_of_runs = combinations(grid)
    most = site.queued_jobs
    if most is not None and len(overrides_of_runs) > most:
        raise SiteError(f"--grid: {len(overrides_of_runs)} runs are more than the {most} jobs that {site.name} holds")
    from pipeline.config import load_config

    folder = Path(load_config(source, [*overrides, *overrides_of_runs[0]], beneath=site.overrides).run_dir)
    runs = []
    for chosen in overrides_of_runs:
        run_dir = folder / _name(chosen)
        runs.append(prepare(source, [*overrides, *chosen, f"run_dir={run_dir}"], site, options))
    request = runs[0].request
    if request.links > 1 and request.chain != "requeue":
        raise SiteError(
            f"--budget: the elements of an array go on by --chain requeue alone, not by {request.chain}; ask for that"
            f" where the site allows it, use --budget {show_duration(request.minutes)}, or submit the runs one by one"
        )
    return folder, runs


def submit_sweep(folder: Path, runs: Sequence[Prepared], parallel: int | None = None) -> list[str]:
    """Write the directories of the runs, submit them as one array, and return their job ids in order.

    Args:
        folder: directory of the sweep, which holds the code and the array's own files.
        runs: its runs.
        parallel: most of them that run at a time; None for all.

    Raises:
        SubmissionError: a directory cannot be written, or the queue does not take the array.
    """
    from slurm.link import Link

    site = runs[0].site
    if parallel is not None and site.scheduler == "local" and parallel < len(runs):
        raise SubmissionError(f"--parallel {parallel}: site local starts all at once; use --parallel {len(runs)}")
    with writing(folder):
        write_snapshot(folder)
        for run in runs:
            write_run(run)
            code = Path(run.request.run_dir) / CODE
            if not code.exists():
                code.symlink_to(Path("..") / CODE)
            write_snapshot(code.parent)  # copies nothing but where a run was submitted by itself before
    lead = max(run.request.signal_seconds for run in runs)
    request = dataclasses.replace(runs[0].request, run_dir=str(folder), signal_seconds=lead)
    with opened([run.request for run in runs]), only_the_script(), refusals(request.name):
        executor = make_executor(site, request)
        if site.scheduler != "local":
            executor.update_parameters(slurm_array_parallelism=parallel or len(runs))
        jobs = [job.job_id for job in executor.submit_array([Link(Path(run.request.run_dir)) for run in runs])]
    for run, job in zip(runs, jobs, strict=True):
        log_submission(run.request, [job])
    return jobs


def _name(overrides: Sequence[str]) -> str:
    """Return the name of a run's directory below the sweep's."""
    name = re.sub(r"[^A-Za-z0-9=.,_+-]+", "-", ",".join(overrides))
    if len(name) > _LONGEST_NAME:
        raise SiteError(
            f"--grid: the directory {name[:40]}... would have {len(name)} characters; sweep over fewer keys"
        )
    return name
