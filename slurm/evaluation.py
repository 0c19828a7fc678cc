"""Jobs beside a chain that evaluate a checkpoint at several depths while the training goes on."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.checkpoints.manifest import checkpoint_name
from slurm import joblog
from slurm.chain import evaluations_due
from slurm.limits import Allotment, allot
from slurm.quarantine import excludable, quarantined
from slurm.request import JobRequest
from slurm.site import Site, SiteError
from slurm.steps import step_environment, train_command
from slurm.submission import always_excluded, make_executor, only_the_script, read_site, refusals


class Evaluation:
    """What Submitit runs in such a job: `rookery eval` on one device of one node.

    Args:
        run_dir: the run directory, absolute.
        checkpoint: of that run.
    """

    def __init__(self, run_dir: Path, checkpoint: Path) -> None:
        self.run_dir = run_dir
        self.checkpoint = checkpoint

    def __call__(self) -> None:
        """Evaluate; end with the status of the command."""
        if not self.checkpoint.is_dir():
            self._note("it was pruned before the job began; keep more, as with checkpoint.keep_every")
            return
        site = read_site(self.run_dir)
        request = evaluation_request(JobRequest.read(self.run_dir), self.checkpoint, site)
        node = os.environ.get("SLURMD_NODENAME", "localhost")
        log = self.run_dir / "jobs" / f"eval-{self.checkpoint.name}"
        log.mkdir(parents=True, exist_ok=True)
        command = train_command(site, request, [node], log, None)
        environment = step_environment(site, request, [node])
        status = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
        if status != 0:
            self._note(f"its job ended with status {status}; see {log}")
            sys.exit(status)

    def _note(self, problem: str) -> None:
        joblog.say(f"{self.checkpoint}: {problem}")
        fields = {"step": int(self.checkpoint.name.rpartition("-")[2]), "checkpoint": self.checkpoint.name}
        joblog.append(self.run_dir, "evaluation", job=None, **fields, evaluation_job=None, problem=problem)


class Evaluations:
    """Submits a job for every k-th checkpoint that appears while a link looks on.

    Args:
        run_dir: the run directory, absolute.
        request: of the run.
        site: where.
        job: of the link.
    """

    def __init__(self, run_dir: Path, request: JobRequest, site: Site, job: str) -> None:
        self._run_dir, self._request, self._site, self._job = run_dir, request, site, job
        self._seen: set[int] = set()  # retention removes checkpoints that count nevertheless

    def look(self, found: Mapping[int, Path]) -> None:
        """Submit the evaluation of every k-th checkpoint since the last one, and write that down.

        Nothing is submitted for a run that is cancelled.

        Args:
            found: step -> directory of the checkpoints that there are.
        """
        self._seen |= found.keys()
        records = joblog.read(self._run_dir)
        if any(record["kind"] == "cancelled" for record in joblog.current_chain(records)):
            return
        evaluated = [record["step"] for record in records if record["kind"] == "evaluation"]
        assert self._request.eval_every is not None
        for step in evaluations_due(self._seen, max(evaluated, default=None), self._request.eval_every):
            job, problem = None, None if step in found else "it was pruned before it was looked at"
            try:
                job = submit_evaluation(self._run_dir, found[step], self._request, self._site) if not problem else None
            except ValueError as error:
                problem = str(error)
            if problem is not None:
                joblog.say(f"step {step} is not evaluated: {problem}")
            fields = {"job": self._job, "step": step, "checkpoint": checkpoint_name(step)}
            joblog.append(self._run_dir, "evaluation", **fields, evaluation_job=job, problem=problem)


def evaluation_request(request: JobRequest, checkpoint: Path, site: Site) -> JobRequest:
    """Return what the queue is asked for to evaluate a checkpoint of the run that `request` describes.

    Raises:
        SiteError: no queue takes a job of one node.
    """
    place = _place(request, site)
    return dataclasses.replace(
        request,
        name=f"{request.name}-eval",
        nodes=1,
        spares=0,
        ranks_per_node=1,
        minutes=place.minutes,
        partition=place.partition,
        qos=place.qos,
        links=1,
        chain="afterany",
        signal_seconds=min(request.signal_seconds, place.minutes * 30),
        command=["-m", "rookery", "eval", str(checkpoint), "--depths", request.eval_depths, "--json"],
    )


def _place(request: JobRequest, site: Site) -> Allotment:
    """Return the run's own queue if that takes one node, else the one by default."""
    try:
        return allot(site, 1, request.eval_minutes, request.partition, request.qos)
    except SiteError:
        return allot(site, 1, request.eval_minutes, None, None)


def submit_evaluation(run_dir: Path, checkpoint: Path, request: JobRequest, site: Site) -> str:
    """Submit the evaluation of a checkpoint and return the job's id.

    Raises:
        SiteError, SubmissionError: the queue does not take it.
    """
    asked = evaluation_request(request, checkpoint, site)
    avoided = list(quarantined(run_dir, request.quarantine_hours, time.time()))
    if site.scheduler != "local":
        avoided = excludable(avoided, asked.partition, asked.nodes, always_excluded(site, asked))
    with only_the_script(), refusals(request.name):
        executor = make_executor(site, asked, exclude=avoided)
        return str(executor.submit(Evaluation(run_dir, checkpoint)).job_id)
