"""One optimizer step of one rank: data, forward, backward, optimizer, control, in this order and each on its own."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pipeline.accelerator import synchronize
from pipeline.agenda import Step
from pipeline.control import Agreement, Cause, Counts, RunControl
from pipeline.depth import Depth
from pipeline.engine import optimizer_step, set_accumulation, set_learning_rate, whole_norm
from pipeline.gradient_digest import GradientDigest
from pipeline.journal import journal
from pipeline.loader import Loader, MicroBatch, TrainingData
from pipeline.model import stream_key
from pipeline.objective import goldfish_labels
from pipeline.sample_hash import LANES, batch_sums
from pipeline.timing import StepClock
from pipeline.trace import Trace
from pipeline.update_probe import UpdateProbe
from pipeline.watchdog import Watchdog

if TYPE_CHECKING:
    from pipeline.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step came to, the same on all ranks.

    Attributes:
        loss_sum: the losses of all trained tokens, summed.
        tokens: number of these tokens.
        gradient_norm: of the whole gradient, before clipping.
        updated: whether the weights were moved.
        cause: what was raised with this step's agreement, if anything.
        sample_sums: of the samples that the ranks fed to the model (`pipeline.sample_hash`).
        reports: the sums over ranks of what they reported.
        fingerprint: of what this rank computed by itself, its loss and gradients; its own on every rank.
        measured: what the probe of the update has found; empty without one.
    """

    loss_sum: float
    tokens: int
    gradient_norm: float
    updated: bool
    cause: Cause | None
    sample_sums: list[float]
    reports: list[float]
    fingerprint: bytes
    measured: dict[str, Any]

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.loss_sum / self.tokens if self.tokens else math.nan


class _Task(NamedTuple):
    """A step that can be done again: its number, what it is, what it trains on, and the updates left out before it."""

    number: int
    step: Step
    batches: list[MicroBatch]
    counts: Counts
    skipped_before: int


class Stepper:
    """Does the steps of a run on one rank.

    Args:
        config: the resolved configuration.
        engine: the model and its optimizer.
        data: the training data.
        control: what this rank agrees on with the others.
        watchdog: ends the run if a step takes too long.
        clock: counts the time of each phase.
        device: this rank's.

    Attributes:
        reports: gives the numbers that this rank reports to all with the loss of each step, as many on every rank.
        veto: asked on every rank, before the weights move, whether it wants the update left out, given the loss in
            nats a token and the norm of the whole gradient; None if every update is to be made.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Any,
        data: TrainingData,
        control: RunControl,
        watchdog: Watchdog,
        clock: StepClock,
        device: torch.device,
    ) -> None:
        self._config, self._engine, self._device = config, engine, device
        self._control, self._watchdog, self._clock = control, watchdog, clock
        self._loader = Loader(data, config.train.micro_batch_size)
        self.reports: Callable[[], list[float]] = list
        self.veto: Callable[[float, float], bool] | None = None
        self._digest: GradientDigest | None = None
        self._at_hand: _Task | None = None
        self._forward_waits = 0.0
        self._alike = data.trains_on_all and config.objective.goldfish == 0

    def take_fingerprints(self) -> None:
        """Let the results of all steps carry fingerprints from now on."""
        self._digest = GradientDigest(self._engine.module)

    def close(self) -> None:
        """End what reads ahead."""
        self._loader.close()

    def do(
        self, number: int, upcoming: list[Step], trace: Trace | None = None, probe: UpdateProbe | None = None
    ) -> StepResult:
        """Do the first of the `upcoming` steps, while the data of the others are read; a collective.

        Args:
            number: its number, from 1.
            upcoming: the step and those after it.
            trace: records the recurrent state of the first micro-batch.
            probe: measures the update; on all ranks or none.

        Raises:
            PeerError: another rank could not read its data.
        """
        step = upcoming[0]
        with self._watchdog.step(len(step.depths), *iterations(step)), journal.phase("step", number):
            batches, counts = self._read(number, upcoming)
            set_learning_rate(self._engine, step.learning_rate)
            set_accumulation(self._engine, len(batches))
            self._at_hand = _Task(number, step, batches, counts, self._engine.skipped_steps)
            return self._optimize(self._at_hand, self._judge, trace, probe)

    def repeat(self, *, update: bool, trace: Trace | None = None, probe: UpdateProbe | None = None) -> StepResult:
        """Do the last step again in place, whose update was left out so that nothing has changed; a collective.

        Args:
            update: whether the weights may be moved this time.
            trace: as for `do`.
            probe: likewise.
        """
        task = self._at_hand
        assert task is not None
        cost = len(task.step.depths), *iterations(task.step)
        with self._watchdog.step(*cost), journal.phase("step again", task.number):
            return self._optimize(task, self._judge if update else _refuse, trace, probe)

    def own_iterations(self) -> tuple[int, float, float]:
        """Return this rank's micro-batches of the last step, and their iterations without and with gradient, summed."""
        assert self._at_hand is not None
        depths = self._at_hand.step.depths
        means = [np.mean(depth, axis=0) if isinstance(depth, list) else np.array(depth) for depth in depths]
        without, with_gradient = np.sum(means, axis=0)
        return len(depths), float(without), float(with_gradient)

    def forward_seconds(self, phases: Mapping[str, float]) -> float:
        """Return the seconds of the last step's forward passes without the collectives in them.

        Args:
            phases: seconds of the phases since the step began.
        """
        return phases.get("forward", 0.0) - self._forward_waits

    def _read(self, number: int, upcoming: list[Step]) -> tuple[list[MicroBatch], Counts]:
        """Return this rank's micro-batches, and the sums over all ranks of what is in them, under way."""
        share, *ahead = (step.share for step in upcoming)
        objective, batches = self._config.objective, list[MicroBatch]()
        failure: Exception | None = None
        try:
            with self._phase("data"):
                batches = [
                    batch._replace(labels=goldfish_labels(batch.labels, batch.input_ids, objective))
                    for batch in self._loader.micro_batches(share, ahead)
                ]
        except Exception as error:  # where the ranks meet now anyway, the others learn of it there
            failure = error
        own = (sum(batch.trained_tokens for batch in batches), len(batches))
        counts = self._control.count(number, own, failure, alike=self._alike)
        if failure is not None:
            self._await(counts)
        return batches, counts

    def _optimize(
        self,
        task: _Task,
        judge: Callable[[Agreement, int], bool],
        trace: Trace | None,
        probe: UpdateProbe | None,
    ) -> StepResult:
        _, step, batches, counts, skipped_before = task
        losses = torch.zeros((), dtype=torch.float64, device=self._device)
        tokens, mean_tokens, gradient_norm = 0, math.nan, math.nan
        sample_sums = np.zeros(LANES)
        agreement: Agreement | None = None
        fingerprint = b""
        self._forward_waits = 0.0
        if self._digest is not None:
            self._digest.reset()
        for index, (batch, depth) in enumerate(zip(batches, step.depths, strict=True)):
            if index == 0 and self._config.zero.stage == 3:  # its forward pass is a collective already
                tokens, mean_tokens = self._await(counts)
            waited = journal.seconds_waited()
            with self._phase("forward"):
                objective = self._forward(batch, depth, trace if index == 0 else None)
            self._forward_waits += journal.seconds_waited() - waited
            sample_sums += batch_sums(batch.samples.tolist())  # of what was fed, whatever the schedule says
            if index == 0 and self._config.zero.stage < 3:
                tokens, mean_tokens = self._await(counts)
            with self._phase("backward"):
                # Every token of the global batch weighs the same, however padding and masks fall on micro-batches.
                self._engine.backward(objective * (batch.trained_tokens / mean_tokens))
                losses += self._engine.module.cross_entropy.double() * batch.trained_tokens
            if index == len(batches) - 1:  # its sum travels during the update
                sums = [*sample_sums.tolist(), *self.reports()]
                broken, fingerprint = self._own_part(losses)
                agreement = self._control.agree(float(losses), broken, self._watchdog.longest_step, sums)
                decide = None if self.veto is None else partial(judge, agreement, tokens)
                self._engine.rookery_gate.arm(decide, probe)
            with self._phase("optimizer"):
                gradient_norm = optimizer_step(self._engine, self._config.optimizer.gradient_clipping)
        synchronize(self._device)
        assert agreement is not None
        with self._phase("control"):
            agreed = agreement.wait()
        updated = self._engine.rookery_gate.passed
        # DeepSpeed counts those alone that it left out itself, and a repetition counts as none.
        self._engine.skipped_steps = skipped_before + (not updated)
        return StepResult(
            loss_sum=agreed.loss_sum,
            tokens=tokens,
            gradient_norm=gradient_norm,
            updated=updated,
            cause=agreed.cause,
            sample_sums=agreed.sums[:LANES],
            reports=agreed.sums[LANES:],
            fingerprint=fingerprint,
            measured={} if probe is None else probe.read(),  # here, where the watchdog looks: the ranks meet
        )

    def _own_part(self, losses: torch.Tensor) -> tuple[str | None, bytes]:
        """Return what of this rank's own is not finite, in words, and a fingerprint of what it computed."""
        digest, finite = b"", True
        if self._digest is not None:
            digest, finite = self._digest.read()
        loss = float(losses)
        broken = f"loss {loss}" if not math.isfinite(loss) else None if finite else "a gradient that is not finite"
        return broken, struct.pack("=d", loss) + digest

    def _judge(self, agreement: Agreement, tokens: int) -> bool:
        """Return whether all ranks let the update pass; a collective."""
        assert self.veto is not None
        loss_sum = agreement.wait().loss_sum
        return not self._control.vetoed(self.veto(loss_sum / max(tokens, 1), whole_norm(self._engine)))

    @torch.no_grad()
    def warm_up(self, length: int) -> None:
        """Compile what an iteration without gradient needs, before the steps, whose time is limited by their cost.

        Args:
            length: tokens of a sequence.
        """
        module, train = self._engine.module, self._config.train
        sizes = {1, train.micro_batch_size} if self._config.depth.scope == "per_sequence" else {train.micro_batch_size}
        for size in sizes:
            ids = torch.zeros(size, length, dtype=torch.int64, device=self._device)
            state = module.initial_state(torch.arange(size, device=self._device), length)
            module(ids, state, (1, 0), documents=ids if train.document_mask else None)

    def _forward(self, batch: MicroBatch, depth: Depth | list[Depth], trace: Trace | None) -> torch.Tensor:
        keys = torch.tensor([stream_key(self._config.seed, "state", int(sample)) for sample in batch.samples])
        state = self._engine.module.initial_state(keys.to(self._device), batch.input_ids.shape[1])
        input_ids, labels = batch.input_ids.to(self._device), batch.labels.to(self._device)
        documents = batch.documents.to(self._device) if self._config.train.document_mask else None
        objective: torch.Tensor = self._engine(input_ids, state, depth, labels, trace, documents)
        return objective

    def _await(self, counts: Counts) -> tuple[int, float]:
        """Return the trained tokens of all ranks, and their mean over the micro-batches, of at least one token."""
        with self._phase("control"):
            tokens, batches = counts.wait()
        return tokens, max(tokens, 1) / batches

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        with journal.phase(name), self._clock(name):
            yield


def _refuse(agreement: Agreement, tokens: int) -> bool:
    agreement.wait()
    return False


def iterations(step: Step) -> tuple[float, float]:
    """Return the iterations without and with gradient of one rank's micro-batches, as the mean rank has them."""
    without, with_gradient = np.mean(step.drawn, axis=0) * len(step.depths)
    return float(without), float(with_gradient)
