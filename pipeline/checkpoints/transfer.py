"""The ranks' files on their way into a tier, behind the steps of the training.

Threads write and rename; they never talk to other ranks. Each rank says "done" or "failed" in the agreement that all
ranks have at every step, and what follows from the sums is done by all ranks at the same step.
"""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from data_prep.world import World
from pipeline.checkpoints.commit import Part, commit, complete, make_partial, partial_of
from pipeline.checkpoints.manifest import CheckpointManifest, encode_manifest

T = TypeVar("T")

_SECONDS_BETWEEN_LOOKS = 0.02


@dataclass(frozen=True, kw_only=True)
class Tier:
    """A place where checkpoints are kept.

    Attributes:
        name: memory, local or shared.
        directory: where they lie; as this rank sees it.
        every: steps between them.
        private: whether each node has a directory of its own, with the files of its ranks.
        commits: whether it is this rank that completes them there.
    """

    name: str
    directory: Path
    every: int
    private: bool
    commits: bool


class Task(Generic[T]):
    """A call in a thread of its own, which ends with the process.

    Attributes:
        error: what it raised, None if it did not.
        seconds: how long it took.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call, self._value = call, list[T]()
        self.error: Exception | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._value.append(self._call())
        except Exception as error:  # every kind is a checkpoint that failed, of which all ranks must learn
            self.error = error
        self.seconds = time.perf_counter() - started

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return not self._thread.is_alive()

    @property
    def value(self) -> T:
        """What the call returned."""
        return self._value[0]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a transfer ended, the same on all ranks but for what one rank alone knows.

    Attributes:
        tier: where to.
        step: of the checkpoint.
        problem: why it failed, with rank and host; None if it did not.
        rank: the rank that failed, None if none did.
        seconds: time that was worked on it.
        manifest: the whole manifest; on rank 0.
        removed: names of older checkpoints that made room for it; on rank 0.
    """

    tier: Tier
    step: int
    problem: str | None = None
    rank: int | None = None
    seconds: float = 0.0
    manifest: CheckpointManifest | None = None
    removed: tuple[str, ...] = ()


class _Stage(Enum):
    IDLE = 0
    OPEN = 1
    WRITING = 2
    COMMITTING = 3


class Transfer:
    """Brings one checkpoint after the other into a tier; every method but `report` and `busy` is a collective.

    Args:
        world: the ranks.
        tidy: called by the rank that completes a checkpoint, in the background, with the tier and the step; removes
            what is not kept and returns the names.
        look: called before every report, for what has to be looked after by this rank's main thread.
    """

    def __init__(
        self, world: World, tidy: Callable[[Tier, int], list[str]], look: Callable[[], None] = lambda: None
    ) -> None:
        self._world, self._tidy, self._look = world, tidy, look
        self._stage = _Stage.IDLE
        self._tasks: list[Task[Part | list[str] | None]] = []
        self.expected = 0
        """Tasks of this rank without which its part is not written."""
        self.part = Part(file=None, entry={}, pieces=[], optimizer_state=[])
        """What this rank added to the last checkpoint that all had written."""
        self._seconds = 0.0

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._stage is not _Stage.IDLE

    def open(self, tier: Tier, draft: CheckpointManifest, refusal: Exception | None = None) -> Outcome | None:
        """Make the directory of a checkpoint; return an outcome if that failed.

        Args:
            tier: where to.
            draft: its manifest; where the checkpoint is copied from another tier, rank 0 gives the whole one.
            refusal: why this rank will not have it saved.
        """
        assert not self.busy
        self._tier, self._draft, self._step = tier, draft, draft.progress.step
        self._tasks, self.expected, self._seconds = [], 1, 0.0
        problem = refusal
        if problem is None and tier.commits:
            try:
                make_partial(tier.directory, self._step)
            except OSError as error:
                problem = error
        self._stage = _Stage.OPEN
        return self._failed(problem)

    @property
    def partial(self) -> Path:
        """Where the files of the checkpoint go."""
        return partial_of(self._tier.directory, self._step)

    def add(self, write: Callable[[], Part | None]) -> None:
        """Write a file in the background; the first of this rank returns its part, the others None."""
        self._stage = _Stage.WRITING
        self._tasks.append(Task(write))

    def report(self) -> list[float]:
        """Return [1, 0] if this rank has done its part of what is going on, [0, 1] if it failed, else zeros."""
        self._look()
        if self._stage in (_Stage.IDLE, _Stage.OPEN) or not all(task.done for task in self._tasks):
            return [0.0, 0.0]
        if len(self._tasks) < self.expected:  # also where one has failed: a message is still under way
            return [0.0, 0.0]
        failed = any(task.error for task in self._tasks)
        return [float(not failed), float(failed)]

    def advance(self, done: float, failed: float) -> Outcome | None:
        """Go on, given the sums of all ranks' reports; return how the checkpoint ended, if it has ended."""
        if not self.busy or done + failed < self._world.size:
            return None
        if failed:
            return self._failed(next((task.error for task in self._tasks if task.error), None))
        if self._stage is _Stage.WRITING:
            self._commit()
            return None
        self._stage = _Stage.IDLE
        removed = self._tasks[0].value if self._tasks else None
        self._seconds += max((task.seconds for task in self._tasks), default=0.0)
        return Outcome(
            tier=self._tier,
            step=self._step,
            seconds=self._seconds,
            manifest=self._draft if self._world.rank == 0 else None,
            removed=tuple(removed) if isinstance(removed, list) else (),
        )

    def wait(self) -> Outcome | None:
        """Wait until nothing is on its way; return how it ended."""
        while self.busy:
            outcome = self.advance(*self._world.sum(np.array(self.report())).tolist())
            if outcome is not None:
                return outcome
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return None

    def _commit(self) -> None:
        part = self._tasks[0].value
        assert isinstance(part, Part)
        self.part = part
        seconds = max(task.seconds for task in self._tasks)
        gathered = self._world.gather((part, seconds))
        content = None
        if gathered is not None:
            if not self._draft.files:
                self._draft = complete(self._draft, [part for part, _ in gathered])
            content = encode_manifest(self._draft)
            self._seconds = max(seconds for _, seconds in gathered)
        if self._tier.private:  # a whole manifest in every node's directory
            content = self._world.broadcast(content)
        tier, step, partial = self._tier, self._step, self.partial

        def work() -> list[str]:
            assert content is not None
            commit(partial, content)
            return self._tidy(tier, step)

        self._tasks = [Task(work)] if tier.commits else []
        self.expected = len(self._tasks)
        self._stage = _Stage.COMMITTING

    def _failed(self, error: Exception | None) -> Outcome | None:
        """Give the checkpoint up if any rank has an error."""
        reports = self._world.allgather(None if error is None else (socket.gethostname(), _in_words(error)))
        found = next(((rank, *report) for rank, report in enumerate(reports) if report is not None), None)
        if found is None:
            return None
        rank, host, words = found
        self._stage = _Stage.IDLE
        if self._tier.commits:
            partial = self.partial
            Task(lambda: shutil.rmtree(partial, ignore_errors=True))  # which gives its room back
        return Outcome(tier=self._tier, step=self._step, problem=f"{words} (rank {rank} on {host})", rank=rank)


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, OSError | ValueError) else repr(error)
