"""One link of a chain of jobs: the process on a job's first node that starts the ranks and decides what comes next.

What it decides by is in `chain`; everything that it knows lies in the run directory, so that a link whose job died
without a word is understood by the next one.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monitoring.crashes.report import write_crash_report
from monitoring.runlog import Record, attempts
from pipeline import job_variables
from pipeline.errors import ExitCode
from slurm import chain, joblog, queue, traces
from slurm.attended import Attendant
from slurm.chain import Move, Verdict
from slurm.evaluation import Evaluations
from slurm.joblog import say
from slurm.lookout import Lookout
from slurm.quarantine import excludable, quarantine, quarantined
from slurm.queue import QueuedJob
from slurm.request import JobRequest
from slurm.spares import CheckError, check_nodes
from slurm.staging import Staged, StagingError, remove_staged, stage
from slurm.steps import launcher_log, step_environment, train_command
from slurm.submission import JOBS, always_excluded, read_site, submit_links

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

_PATIENCE = 600.0  # seconds that a controller may be away when a chain hangs on its answer
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_BETWEEN_EVALUATIONS = 5.0
_SECONDS_TO_END = 20.0  # for ranks that have nothing to save yet
_SECONDS_AFTER_TROUBLE = 600.0
_SUBMISSIONS = 5
_SECONDS_BETWEEN_SUBMISSIONS = 20.0


class Link:
    """What Submitit runs in every job of a run.

    Args:
        run_dir: the run directory, absolute.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __call__(self) -> None:
        """Supervise the job; exit 0 when the run goes on or is finished, else with the run's code."""
        status = _Supervisor(self.run_dir).run()
        if status:
            sys.exit(status)

    def checkpoint(self) -> DelayedSubmission:
        """Return what a requeued job begins with: the same again; the run directory holds all that a link knows."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Link(self.run_dir))


class _Supervisor:
    """A link at work."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._request, self._site = JobRequest.read(run_dir), read_site(run_dir)
        self._local = self._site.scheduler == "local"
        self._job = job_id(local=self._local)
        self._restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self._lookout = Lookout(self._job, local=self._local)
        self._attendant = Attendant(signal.SIGTERM if self._local else signal.SIGUSR2)
        self._unwritten: list[Record] = []
        self._began = time.time()
        self._look_at, self._evaluate_at = 0.0, 0.0
        self._launched: Record | None = None  # while its ranks run
        self._launched_at = self._told_at = 0.0
        self._evaluations = Evaluations(run_dir, self._request, self._site, self._job)

    def run(self) -> int:
        """Do what a link does; at a site without a queue, all that a chain does. Return the exit status."""
        self._attendant.listen()
        if not self._is_alone():
            return 0
        while True:
            self._settle()
            if (done := self._over()) is not None:
                return self._finish(*done)
            self._serve()
            if (done := self._over()) is not None:
                return self._finish(*done)
            waiting = self._waiting()
            move = chain.next_move(self._request, local=self._local, waiting=bool(waiting))
            if move is not Move.AGAIN:
                return self._go_on(move, waiting)
            if self._attendant.told is not None:  # whoever ends this process does not want another one's work
                return self._finish(ExitCode.STOPPED, f"ended by {self._attendant.told}; submit again to go on")
            self._restart += 1

    # What is known

    def _records(self) -> list[Record]:
        return [*joblog.current_chain(joblog.read(self._run_dir)), *self._unwritten]

    def _note(self, kind: str, **fields: Any) -> None:
        if not joblog.append(self._run_dir, kind, **fields):
            self._unwritten.append({"time": time.time(), "kind": kind} | fields)

    def _newest_step(self) -> int | None:
        return max(traces.checkpoints(self._run_dir), default=None)

    def _over(self) -> tuple[int, str] | None:
        records, newest = self._records(), self._newest_step()
        done = chain.over(records, newest, self._request)
        if done is None and self._unwritten and chain.launches_in_vain(records, newest):
            # Nobody could count the launches: they would go on for ever.
            return chain.GAVE_UP, f"{self._run_dir} cannot be written; make room and submit again"
        return done

    def _told(self) -> bool:
        return self._attendant.told is not None

    def _waiting(self) -> dict[str, QueuedJob | None]:
        """Return the jobs that wait to follow this one; those that are still being submitted are waited for."""
        while not (found := self._lookout.living(chain.waiting_jobs(self._records(), self._job))):
            if self._local or self._told() or not chain.is_being_submitted(self._records(), self._request, time.time()):
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return found

    def _avoided(self) -> dict[str, str]:
        return quarantined(self._run_dir, self._request.quarantine_hours, time.time())

    def _allocation(self) -> list[str]:
        """Return the nodes that this job has; the environment still names those that it has lost."""
        if self._local:
            return [socket.gethostname()]
        job = self._lookout.own_job()
        return queue.expand((job.node_list if job else "") or os.environ["SLURM_JOB_NODELIST"])

    def _seconds_left(self) -> float:
        job = self._lookout.own_job()
        if job is not None and job.time_left_seconds is not None:
            return job.time_left_seconds
        return self._request.minutes * 60.0 - (time.time() - self._began)

    # Before the ranks

    def _is_alone(self) -> bool:
        """Return whether no other link of the chain is at work; one that is about to end is waited for."""
        before = chain.job_before(self._records(), self._job)
        if before is None or self._over() is not None:
            return True
        if self._lookout.left(before, hurry=self._told):
            return True
        say(f"job {before} of this run is still at work; this one starts nothing")
        self._note("yielded", job=self._job, to=before)
        return False

    def _settle(self) -> None:
        """Write down how the last launch ended if its link could not, and which of its nodes are gone since."""
        launched = chain.unsettled(self._records())
        if launched is not None:
            self._note_end(launched, None, self._verdict(launched, None), time=self._end_of(launched))
        suspects = chain.suspects(self._records())
        lost = self._lookout.lost(suspects) - self._avoided().keys()
        if lost:
            self._quarantine({node: reason for node, reason in suspects.items() if node in lost})
            self._report_crash(self._newest_attempt())

    def _end_of(self, launched: Record) -> float:
        """Return when a launch ended whose job died: what came after, such as days in the queue, is not its time."""
        job = self._lookout.find(launched["job"]) if launched["job"] != self._job else None
        if job is not None and job.over and job.end is not None:
            return max(job.end, float(launched["time"]))
        return traces.last_sign(self._run_dir, launched)

    def _quarantine(self, nodes: dict[str, str]) -> None:
        for node, reason in nodes.items():
            say(f"{node} is avoided from now on: {reason}")
            quarantine(self._run_dir, node, reason, self._job)

    def _stage(self, nodes: Sequence[str]) -> Staged:
        """Return what the nodes have on their own disks: nothing if that fails, and the ranks read the shared files."""
        if not self._request.stage:
            return Staged()
        try:
            staged = stage(self._site, self._request, nodes, self._job)
        except StagingError as error:
            say(f"not staged, the shared files are used: {error}")
            self._note("not_staged", job=self._job, reason=str(error))
            self._tidy(nodes)
            return Staged()
        self._note("staged", job=self._job, seconds=staged.seconds, what=staged.what)
        return staged

    def _check(self, nodes: Sequence[str], python: str | None) -> None:
        """Try the devices of all nodes, spares too, before the ranks start on some of them."""

        def run(
            command: Sequence[str], environment: Mapping[str, str], log: Path, between: Callable[[], None]
        ) -> int | None:
            def look() -> None:
                between()
                self._look()

            return self._attendant.run(command, environment, log, look)

        try:
            bad = check_nodes(self._site, self._request, nodes, python, self._new_folder(), run)
        except (CheckError, OSError) as error:
            say(f"nodes not checked: {error}")
        else:
            if not self._told():  # else they were ended before they could answer
                self._quarantine(bad)

    def _new_folder(self) -> Path:
        parent = self._run_dir / JOBS / self._job
        parent.mkdir(parents=True, exist_ok=True)
        folder = parent / str(
            1 + max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0)
        )
        folder.mkdir()
        return folder

    # The ranks

    def _serve(self) -> None:
        """Start the ranks, and again within this job as long as bad nodes are to blame and good ones are left."""
        self._began = time.time()
        allocation = self._allocation()
        self._note(
            "began",
            job=self._job,
            restart=self._restart,
            nodes=allocation,
            node_count=len(allocation),
            checkpoint=self._newest_step(),
        )
        checked = not self._request.spares
        while self._over() is None:
            nodes = chain.usable(allocation, self._avoided(), self._lookout.lost(allocation))
            staged = self._stage(nodes) if len(nodes) >= self._request.nodes else Staged()
            if not checked:
                checked = True
                self._check(nodes, staged.python)
                nodes = chain.usable(nodes, self._avoided(), ())
            if self._told():
                return None
            if len(nodes) < self._request.nodes:
                return self._refuse(nodes, allocation)
            chosen = nodes[: self._request.nodes]
            verdict = self._launch(chosen, staged)
            self._quarantine(dict.fromkeys(verdict.hosts, verdict.reason))
            if self._told():
                return None  # there may be seconds left, and the next link finds out about the nodes
            allocation = self._allocation()
            lost = self._lookout.lost({*chosen, *allocation})
            if verdict.code is None and lost.intersection(chosen):
                self._quarantine({node: f"lost during job {self._job}" for node in chosen if node in lost})
                self._report_crash(self._newest_attempt())
            left = chain.usable(allocation, self._avoided(), lost)
            gone = lost.intersection(chosen)
            if not chain.relaunch(verdict, gone, len(left), self._request, self._seconds_left()):
                return self._tidy(left)
        return None

    def _refuse(self, nodes: Sequence[str], allocation: Sequence[str]) -> None:
        bad = [node for node in allocation if node not in nodes]
        needed = self._request.nodes
        reason = f"{len(nodes)} of the {needed} nodes that are needed are good; not {chain.shown(bad)}"
        self._note_end({"job": self._job, "launch": None}, None, Verdict(int(ExitCode.UNHEALTHY_NODE), reason))

    def _launch(self, nodes: Sequence[str], staged: Staged) -> Verdict:
        """Start the ranks, wait until they have ended, and write down how."""
        before = max(attempts(self._run_dir), default=0)
        launched: Record = {"job": self._job, "launch": None, "nodes": list(nodes), "attempts": before, "log": ""}
        status: int | None = None
        try:
            folder = self._new_folder()
            launched |= {"launch": int(folder.name), "log": str(folder.relative_to(self._run_dir))}
            self._note("launched", **launched, checkpoint=self._newest_step())
            refusal = {job_variables.REFUSAL: str(folder / traces.REFUSAL)}
            environment = step_environment(self._site, self._request, nodes) | staged.environment | refusal
            command = train_command(self._site, self._request, nodes, folder, staged.python)
            self._launched, self._launched_at, self._told_at = launched, time.monotonic(), 0.0
            status = self._attendant.run(command, environment, launcher_log(self._site, folder), self._between)
        except OSError as error:
            verdict = Verdict(None, f"the ranks could not be started: {error}")
        else:
            verdict = self._verdict(launched, status)
        self._launched = None
        self._note_end(launched, status, verdict)
        self._evaluate()
        return verdict

    def _between(self) -> None:
        """Look around while the ranks run; whatever goes wrong here must not end them."""
        self._look()
        now = time.monotonic()
        if now >= self._evaluate_at:
            self._evaluate_at = now + _SECONDS_BETWEEN_EVALUATIONS
            self._evaluate()

    def _look(self) -> None:
        """Find out whether the run is cancelled."""
        now = time.monotonic()
        try:
            if now >= self._look_at:
                self._look_at = now + _SECONDS_BETWEEN_LOOKS
                if any(record["kind"] == "cancelled" for record in self._records()):
                    self._attendant.tell("cancelled")
                self._end_a_start_that_hangs(now)
        except Exception:
            self._look_at = now + _SECONDS_AFTER_TROUBLE
            traceback.print_exc()

    def _end_a_start_that_hangs(self, now: float) -> None:
        """End ranks that have begun no attempt in time: no watchdog sees them yet, and there is nothing to save."""
        if self._launched is None or traces.attempt_of(self._run_dir, self._launched) is not None:
            return
        if self._told() and not self._told_at:
            self._told_at = now
        limit = self._request.start_minutes
        if self._told_at and now > self._told_at + _SECONDS_TO_END:
            self._attendant.end("the job was told to end, and no attempt had begun")
        elif limit is not None and now > self._launched_at + limit * 60.0:
            self._attendant.end(f"no attempt began within {limit:g} minutes (control.hang_start_minutes)")

    def _evaluate(self) -> None:
        """Submit the evaluation of the newest checkpoint if that is due; the run goes on without it."""
        if self._request.eval_every is None or self._attendant.told is not None:
            return
        try:
            self._evaluations.look(traces.checkpoints(self._run_dir))
        except Exception:
            self._evaluate_at = time.monotonic() + _SECONDS_AFTER_TROUBLE
            traceback.print_exc()

    def _verdict(self, launched: Record, status: int | None) -> Verdict:
        verdict = traces.verdict(self._run_dir, launched, status)
        if verdict.code is None and self._attendant.ended is not None:
            return replace(verdict, reason=f"ended by the link: {self._attendant.ended}")
        if verdict.code is None and status is not None and self._attendant.told is not None:
            return replace(verdict, reason=f"{verdict.reason}; the job was told to end by {self._attendant.told}")
        return verdict

    def _note_end(self, launched: Record, status: int | None, verdict: Verdict, **more: Any) -> None:
        code = "a crash" if verdict.code is None else f"code {verdict.code}"
        say(f"launch {launched['launch']} of job {launched['job']} ended with {code}: {verdict.reason}")
        attempt = traces.attempt_of(self._run_dir, launched) if "attempts" in launched else None
        self._note(
            "ended",
            job=launched["job"],
            launch=launched["launch"],
            status=status,
            code=verdict.code,
            attempt=attempt,
            reason=verdict.reason,
            nodes_blamed=verdict.hosts,
            **more,
        )
        self._report_crash(attempt)

    def _newest_attempt(self) -> int | None:
        return max(attempts(self._run_dir), default=None)

    def _report_crash(self, attempt: int | None) -> None:
        """Put together what is known of an attempt that has ended, unless it ended well; again when more is known."""
        if attempt is not None and (path := write_crash_report(self._run_dir, attempt)) is not None:
            say(f"what is known of it: {path}")

    # After the ranks

    def _tidy(self, nodes: Sequence[str]) -> None:
        if self._request.stage and nodes:
            try:
                remove_staged(self._site, self._request, nodes, self._job)
            except StagingError as error:
                say(str(error))

    def _finish(self, code: int, reason: str) -> int:
        """End the chain, and say so once."""
        if any(record["kind"] == "over" for record in self._records()):
            return 0
        say(f"the chain is over: {reason}")
        self._note("over", code=int(code), reason=reason)
        waiting = chain.waiting_jobs(self._records(), self._job)
        try:
            queue.scancel(list(self._lookout.living(waiting)), patience=_PATIENCE)
        except queue.QueueError as error:
            say(f"{error}; the links that wait will see that the chain is over")
        return chain.exit_status(code)

    def _go_on(self, move: Move, waiting: Mapping[str, QueuedJob | None]) -> int:
        if move is Move.LEAVE:
            self._keep_off(waiting)
            return 0
        return self._requeue() if move is Move.REQUEUE else self._submit()

    def _keep_off(self, jobs: Mapping[str, QueuedJob | None]) -> None:
        """Keep jobs that wait off the nodes to avoid now, and off no others."""
        needed = self._request.nodes + self._request.spares
        try:
            always = always_excluded(self._site, self._request)
            nodes = excludable(list(self._avoided()), self._request.partition, needed, always)
            self._lookout.keep_off(jobs, nodes, always)
        except queue.QueueError as error:
            say(f"{error}; the next link leaves the nodes aside by itself if it gets others")

    def _requeue(self) -> int:
        """Put this job back into the queue; SLURM ends this process within seconds."""
        self._note("requeued", job=self._job)
        try:
            queue.requeue(self._job, patience=_PATIENCE)
        except queue.QueueError as error:
            say(str(error))
            return self._submit() if self._is_stranded() else 0
        self._keep_off(self._lookout.living([self._job]))
        return 0

    def _is_stranded(self) -> bool:
        """Whether nobody puts this job back into the queue; SLURM does so itself, as with one that is preempted."""
        try:
            job = queue.job_states([self._job]).get(self._job)
        except queue.QueueError as error:
            say(f"{error}; whether this job was requeued is not known: see `rookery status`")
            return False
        return job is None or job.state == "RUNNING"

    def _submit(self) -> int:
        """Submit new jobs for the links that are left, however long the controller is away."""
        first, reason = chain.next_link(self._records(), self._request), ""
        for _ in range(_SUBMISSIONS):
            try:
                jobs = submit_links(self._run_dir, first, list(self._avoided()), continues=True)
            except (ValueError, OSError) as error:
                reason = str(error)
                say(reason)
                time.sleep(_SECONDS_BETWEEN_SUBMISSIONS)
            else:
                say(f"goes on as {chain.shown(jobs)}")
                return 0
        return self._finish(chain.GAVE_UP, f"the next link could not be submitted: {reason}")


def job_id(*, local: bool) -> str:
    """Return the id of the job that this process runs in, as `submitted` records name it."""
    if local:
        return os.environ.get("SUBMITIT_LOCAL_JOB_ID") or str(os.getpid())
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
