"""What a rank does in a step: learning rate, samples and depths, from the configuration and the step alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from monitoring.runlog import Record
from pipeline.depth import Depth, DepthSchedule, deal
from pipeline.flops import sequence_flops
from pipeline.loader import Share, contiguous
from pipeline.rollback import Adjustment, rate_factor
from pipeline.schedules import batch_size, learning_rate_ratio

if TYPE_CHECKING:
    from pipeline.config import RunConfig

_DIGEST_STEPS = 16


@dataclass(frozen=True)
class Step:
    """One step of one rank.

    Attributes:
        learning_rate: peak rate times the schedule, times what rollbacks have made of it.
        share: the rank's samples.
        depths: what each micro-batch of `share` is run with, one depth for all of its sequences or one for each.
        drawn: all depths of the step, over all ranks: one, one a micro-batch or one a sequence.
    """

    learning_rate: float
    share: Share
    depths: list[Depth | list[Depth]]
    drawn: list[Depth]

    def depth_record(self) -> Record:
        """Return (n, k) for the run log; of several depths the rounded means, and how often each r was drawn."""
        mean = np.rint(np.mean(self.drawn, axis=0)).astype(int).tolist()
        counts = Counter(sum(depth) for depth in self.drawn)
        several = {"depths": {str(r): counts[r] for r in sorted(counts)}} if len(self.drawn) > 1 else {}
        return {"num_steps": mean, **several}


class Agenda:
    """The steps of a run as one rank sees them.

    Args:
        config: the resolved configuration.
        rank: the rank.
        world_size: number of ranks.
    """

    def __init__(self, config: RunConfig, rank: int, world_size: int) -> None:
        self._config, self._rank, self._world_size = config, rank, world_size
        self._schedule = DepthSchedule(config.depth, config.seed)
        self._flops = sequence_flops(config.model, config.train.activation_checkpointing)
        self._known: dict[tuple[int, int], Step] = {}
        self._adjustments: Sequence[Adjustment] = ()

    def adjust(self, adjustments: Sequence[Adjustment]) -> None:
        """Use what rollbacks have made of the learning rate, from now on."""
        self._adjustments = adjustments
        self._known.clear()

    def upcoming(self, step: int, consumed: int, ahead: int) -> list[Step]:
        """Return `step`, which begins after `consumed` samples, and up to `ahead` steps after it."""
        last = min(step + ahead, self._config.train.steps - 1)
        known, self._known = self._known, {}
        steps = []
        for number in range(step, last + 1):
            key = (number, consumed)
            steps.append(self._known.setdefault(key, known.get(key) or self.at(number, consumed)))
            consumed += steps[-1].share.batch_size
        return steps

    def at(self, step: int, consumed: int) -> Step:
        """Return `step`, which begins after `consumed` samples."""
        config, scope = self._config, self._config.depth.scope
        ratio = learning_rate_ratio(config.schedule, step, config.train.steps)
        size, micro = batch_size(config.schedule, config.train.global_batch_size, step), config.train.micro_batch_size
        numbers = contiguous(self._rank, self._world_size, size // micro)
        depths: list[Depth | list[Depth]]
        if scope == "lockstep":
            drawn = [self._schedule.at(step)]
            depths = [drawn[0]] * len(numbers)
        elif scope == "balanced":
            drawn = self._schedule.balanced(step, size // micro)
            numbers = tuple(deal([self._flops.training(depth) for depth in drawn], self._world_size)[self._rank])
            depths = [drawn[number] for number in numbers]
        else:
            drawn = self._schedule.per_sequence(step, range(consumed, consumed + size))
            depths = [drawn[number * micro : (number + 1) * micro] for number in numbers]
        rate = config.optimizer.learning_rate * ratio * rate_factor(self._adjustments, step)
        return Step(rate, Share(consumed, size, numbers), depths, drawn)


def schedule_digest(config: RunConfig, step: int) -> str:
    """Return a hash of what the configuration and this machine's arithmetic make of the steps from `step` on.

    Ranks whose hashes differ would wait for each other for ever, or train on the wrong depths in silence.
    """
    steps = range(step, min(step + _DIGEST_STEPS, config.train.steps))
    planned = [
        (
            learning_rate_ratio(config.schedule, number, config.train.steps),
            batch_size(config.schedule, config.train.global_batch_size, number),
        )
        for number in steps
    ]
    depths = DepthSchedule(config.depth, config.seed).digest(steps)
    return hashlib.sha256(repr((depths, planned, config.train.micro_batch_size)).encode()).hexdigest()
