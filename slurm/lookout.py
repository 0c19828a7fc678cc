"""What a link finds out from the queue, and asks of it: an answer that does not come ends no link."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence

from slurm import queue
from slurm.joblog import say
from slurm.queue import QueuedJob

_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
_SECONDS_TO_LEAVE = 60.0  # that a job may take to end, or to be cleared from its nodes, when the next one is there
_SECONDS_BETWEEN = 1.0


class Lookout:
    """Asks the queue in the name of a link.

    Args:
        job: of the link.
        local: whether there is no queue; then nothing is known, and nothing asked.
    """

    def __init__(self, job: str, *, local: bool) -> None:
        self._job, self._local = job, local

    def own_job(self) -> QueuedJob | None:
        """Return the link's own job, None if the queue does not say."""
        return self.find(self._job)

    def find(self, id_: str) -> QueuedJob | None:
        """Return a job, None if the queue does not know it, or does not answer."""
        return self.living([id_], over=True).get(id_)

    def living(self, ids: Sequence[str], *, over: bool = False) -> dict[str, QueuedJob | None]:
        """Return the jobs that wait or run, in order; all of them, as None, if the queue does not say.

        Args:
            ids: of the jobs.
            over: whether to return those that are over as well.
        """
        if self._local:
            return {}
        try:
            known = queue.job_states(ids)
        except queue.QueueError as error:
            say(str(error))
            return dict.fromkeys(ids)
        return {id_: known[id_] for id_ in ids if id_ in known and (over or not known[id_].over)}

    def lost(self, nodes: Collection[str]) -> set[str]:
        """Return which of the nodes are down or drained; none if the queue does not say."""
        if self._local:
            return set()
        try:
            return {node for node, state in queue.node_states(nodes).items() if queue.lost(state)}
        except queue.QueueError as error:
            say(str(error))
            return set()

    def left(self, id_: str, hurry: Callable[[], bool]) -> bool:
        """Wait for the end of a job, and return whether it came: False if the job is still at work after a minute.

        Args:
            id_: of the job.
            hurry: whether not to wait any longer.
        """
        deadline = time.monotonic() + _SECONDS_TO_LEAVE
        while True:
            job = self.find(id_)
            if job is None or job.over or job.state in _WAITING:
                return True
            if hurry() or time.monotonic() > deadline:
                # Nodes that do not answer keep a job completing; nothing of it works any more.
                return job.state == "COMPLETING"
            time.sleep(_SECONDS_BETWEEN)

    def keep_off(self, jobs: Mapping[str, QueuedJob | None], nodes: Sequence[str], always: Sequence[str]) -> None:
        """Keep waiting jobs off nodes, and off no others; those that are so already are left alone.

        Args:
            jobs: as `living` returns them.
            nodes: to keep off, if the queue accepts that.
            always: to keep off in any case.

        Raises:
            QueueError: the queue does not answer, or refuses `always`.
        """
        wanted = {*nodes, *always}
        known = queue.excluded([id_ for id_, job in jobs.items() if job is not None])
        for id_ in [id_ for id_ in known if known[id_] != wanted]:
            try:
                queue.exclude([id_], sorted(wanted))
            except queue.RefusedError as error:
                say(f"{error}; goes without")
                queue.exclude([id_], sorted(always))
