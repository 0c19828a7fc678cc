"""One agreement of all ranks a step: the loss, and whether and why the run has to end here.

What one rank alone knows (a signal, the clock, a loss that is not finite, a damaged row) becomes a decision of all
ranks at the same step. The sums are begun as soon as what they carry is known and awaited when it is needed, so that
the ranks meet while they compute.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.errors import ConfigError
from pipeline.job_time import seconds_left

if TYPE_CHECKING:
    from data_prep.world import PendingSum, World


@dataclass(kw_only=True)
class ControlConfig:
    """When a run ends itself: before its time is over, and when a rank hangs."""

    time_limit_minutes: float | None = None
    """Time from the start of this attempt to its end; null: what SLURM grants, else no limit."""
    stop_margin_seconds: float = 120.0
    """Least time before the end at which the run saves and stops; more where saves or steps take long."""
    watchdog: bool = True
    """End the run with a report when a rank hangs; false under a debugger."""
    hang_factor: float = 10.0
    """A step hangs when it takes this many times the fitted cost of its depth."""
    hang_floor_seconds: float = 120.0
    """No step hangs before this time."""
    hang_start_minutes: float = 30.0
    """Limit of building and loading, and of each of the first steps, which may compile."""
    hang_save_minutes: float = 30.0
    """Limit of a checkpoint, and of a validation."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.time_limit_minutes is not None and self.time_limit_minutes <= 0.0:
            raise ConfigError(f"control.time_limit_minutes: {self.time_limit_minutes} is not positive; use null")
        if self.stop_margin_seconds < 0.0:
            raise ConfigError(f"control.stop_margin_seconds: {self.stop_margin_seconds} is negative")
        if self.time_limit_minutes is not None and self.time_limit_minutes * 60.0 <= self.stop_margin_seconds:
            raise ConfigError(
                f"control.time_limit_minutes: {self.time_limit_minutes} leaves nothing beside"
                f" control.stop_margin_seconds = {self.stop_margin_seconds}; raise it, or lower the margin"
            )
        if self.hang_factor <= 1.0:
            raise ConfigError(f"control.hang_factor: {self.hang_factor} is not above 1; steps take their cost")
        for name in ("hang_floor_seconds", "hang_start_minutes", "hang_save_minutes"):
            if getattr(self, name) <= 0.0:
                raise ConfigError(f"control.{name}: {getattr(self, name)} is not positive")


class Flag(IntEnum):
    """What a rank has to tell all others after a step, the more important first."""

    SIGNAL = 0
    TIME_LEFT = 1
    VERDICT = 2
    """What rank 0 made of the steps before: back to a checkpoint, or no further (pipeline/oversight.py)."""
    NON_FINITE = 3
    """This rank's loss, or its own part of the gradient, is not finite."""

    @property
    def stops(self) -> bool:
        """Whether the run has to end here, whatever its state."""
        return self in (Flag.SIGNAL, Flag.TIME_LEFT)


@dataclass(frozen=True, kw_only=True)
class Cause:
    """What was raised, as the lowest rank that knows of it said.

    Attributes:
        flag: the kind of reason.
        detail: in words: the signal's name, the time left, the loss.
        rank: that rank.
        host: its host.
        ranks: number of ranks that raised the flag.
    """

    flag: Flag
    detail: str
    rank: int
    host: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.detail} on rank {self.rank} ({self.host})"


class Counts:
    """The sums of what the ranks are about to train on, under way.

    Where all ranks train on alike nothing is asked, and a failure here is for the caller to raise.
    """

    def __init__(
        self, world: World, step: int, own: tuple[int, int], failure: Exception | None, *, alike: bool
    ) -> None:
        if alike and failure is not None:
            raise failure
        self._world, self._step, self._failure = world, step, failure
        self._known = (own[0] * world.size, own[1] * world.size)
        values = np.array([*own, failure is not None], dtype=np.float64)
        self._pending = None if alike else world.start_sum(values)

    def wait(self) -> tuple[int, int]:
        """Return (trained tokens, micro-batches) over all ranks.

        Raises:
            PeerError, or this rank's own failure: a rank could not read its part; on every rank.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            tokens, batches, failures = pending.wait()
            if failures:
                with self._world.guard(f"data of step {self._step}"):
                    if self._failure is not None:
                        raise self._failure
            self._known = int(tokens), int(batches)
        return self._known


class Agreed(NamedTuple):
    """What came of an agreement, the same on all ranks.

    Attributes:
        loss_sum: the sum of the losses.
        cause: the most important flag that was raised, if any.
        sums: what else the ranks gave, summed.
    """

    loss_sum: float
    cause: Cause | None
    sums: list[float]


class Agreement:
    """What the ranks say about one step, under way."""

    def __init__(self, world: World, loss_sum: float, flags: Mapping[Flag, str], sums: Sequence[float]) -> None:
        self._world, self._flags = world, dict(flags)
        raised = [float(flag in flags) for flag in Flag]
        self._pending: PendingSum = world.start_sum(np.array([loss_sum, *raised, *sums]))
        self._agreed: Agreed | None = None

    def wait(self) -> Agreed:
        """Return what came of it; again and again the same."""
        if self._agreed is None:
            self._agreed = self._ask()
        return self._agreed

    def _ask(self) -> Agreed:
        loss_sum, *rest = self._pending.wait().tolist()
        raised, sums = rest[: len(Flag)], rest[len(Flag) :]
        flag = next((flag for flag in Flag if raised[flag]), None)
        if flag is None:
            return Agreed(loss_sum, None, sums)
        said = self._world.allgather((socket.gethostname(), self._flags.get(flag)))
        rank = next(rank for rank, (_, detail) in enumerate(said) if detail is not None)
        host, detail = said[rank]
        cause = Cause(flag=flag, detail=str(detail), rank=rank, host=host, ranks=int(raised[flag]))
        return Agreed(loss_sum, cause, sums)


class RunControl:
    """What this rank says in the agreements.

    Args:
        config: the margin before the end, and the time limit if it is set.
        world: the ranks; the clock of rank 0 alone counts.
        signals: what this process was sent.

    Attributes:
        save_seconds: how long the last checkpoint took, from its snapshot to its commit; set by whoever saves.
        saving: number of those on their way, which the last one has to wait for; likewise.
        validation_seconds: how long the last validation took, likewise.
        verdict: what rank 0 says to all with the next agreement, None for nothing; set by whoever judges the steps.
    """

    def __init__(self, config: ControlConfig, world: World, signals: StopSignals) -> None:
        self._world, self._signals, self._margin = world, signals, config.stop_margin_seconds
        self.save_seconds = self.validation_seconds = 0.0
        self.saving = 0
        self.verdict: str | None = None
        self._end: float | None = None
        if world.rank == 0:
            seconds = seconds_left(os.environ) if config.time_limit_minutes is None else config.time_limit_minutes * 60
            self._end = None if seconds is None else time.monotonic() + seconds

    def count(self, step: int, own: tuple[int, int], failure: Exception | None, *, alike: bool) -> Counts:
        """Begin to sum up what the ranks train on in `step`.

        Args:
            step: its number.
            own: trained tokens and micro-batches of this rank.
            failure: why this rank could not read them, None if it could.
            alike: whether every rank has as many of both, so that nobody needs to ask.
        """
        return Counts(self._world, step, own, failure, alike=alike)

    def vetoed(self, own: bool) -> bool:
        """Return whether any rank wants the update left out; a collective, once the whole gradient is known."""
        return bool(self._world.sum(np.array([float(own)]))[0] > 0.0)

    def agree(self, loss_sum: float, broken: str | None, longest_step: float, sums: Sequence[float]) -> Agreement:
        """Begin the agreement on a step whose loss is known, while its update is not yet done.

        Args:
            loss_sum: summed losses of this rank's tokens.
            broken: what of this rank's is not finite, in words; None if all is.
            longest_step: seconds of the longest of the last steps.
            sums: numbers to be summed over ranks along with it, as many on every rank.
        """
        flags = {
            Flag.VERDICT: self.verdict,
            Flag.NON_FINITE: broken,
            Flag.SIGNAL: self._signals.received,
            Flag.TIME_LEFT: self._time_left(longest_step),
        }
        flagged = {flag: said for flag, said in flags.items() if said is not None}
        return Agreement(self._world, loss_sum, flagged, sums)

    def _time_left(self, longest_step: float) -> str | None:
        """Return how much time is left, in words, if another step and the saves after it may not fit into it.

        The step comes with its validation; the last save may take twice as long as the one before, and begins when
        the one that is being written has ended.
        """
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        saves = (2.0 + self.saving) * self.save_seconds
        if left > longest_step + self.validation_seconds + max(self._margin, saves + longest_step):
            return None
        return f"{max(left, 0.0):.0f} s left of the job's time"


class StopSignals:
    """Turns SIGTERM, SIGUSR1, SIGUSR2 and SIGINT into a flag; the ranks agree on it at the end of a step.

    Attributes:
        received: name of the first signal that arrived, None before.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.received: str | None = None

    def listen(self) -> None:
        """Take the signals from now on to the end of the process, so that none of them kills it while it ends."""
        for number in self._SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt  # whoever types it twice does not want to wait
        self.received = self.received or signal.Signals(number).name
