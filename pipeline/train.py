"""The training loop. Step t is a pure function of (configuration, seed, t), so to resume is to seek to t."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_prep.world import World
from kernels.attention import BACKENDS
from monitoring.runlog import Record, RunLog
from pipeline.accelerator import synchronize
from pipeline.agenda import Agenda, Step
from pipeline.attempt import attempt, prepare
from pipeline.checkpoint import (
    WEIGHT,
    CheckpointReader,
    Progress,
    list_checkpoints,
    prune_checkpoints,
    save_checkpoint,
)
from pipeline.depth import Depth
from pipeline.engine import (
    allocate_optimizer_state,
    build_engine,
    local_fragments,
    optimizer_step,
    owned_fragments,
    publish_weights,
    set_accumulation,
    set_learning_rate,
    start_process_group,
    stop_process_group,
)
from pipeline.errors import ConfigError, ExitCode
from pipeline.loader import Loader, MicroBatch, TrainingData
from pipeline.model import RecurrentDepthModel, reference_name, stream_key
from pipeline.objective import goldfish_labels
from pipeline.optim import build_optimizer
from pipeline.pretrained import load_pretrained
from pipeline.recurrence import Trace

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.schedules import ScheduleConfig

PRECISIONS = ("fp32", "bf16")


@dataclass(kw_only=True)
class TrainConfig:
    """The loop: how long, how large a batch, in which arithmetic."""

    steps: int
    """Optimizer steps of the whole run."""
    global_batch_size: int
    """Sequences of one optimizer step, over all ranks."""
    micro_batch_size: int
    """Sequences of one forward pass on one rank; the rest of the batch is accumulated."""
    precision: str = "bf16"
    """fp32, or bf16 with float32 master weights and gradient sums."""
    attention: str = "sdpa"
    """Attention backend: sdpa, or flash where flash-attn is installed."""
    checkpoint_iterations: bool = False
    """Recompute each iteration of the core in the backward pass instead of keeping its activations."""
    document_mask: bool = False
    """Hide the documents of a row from each other; needs attention sdpa."""
    probe_every: int = 10
    """Steps between measurements of the recurrent state on one micro-batch."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name in ("steps", "global_batch_size", "micro_batch_size", "probe_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}: {getattr(self, name)} is not positive")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"train.precision: {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.attention not in BACKENDS:
            raise ConfigError(f"train.attention: {self.attention!r} is not one of {', '.join(BACKENDS)}")
        if self.attention == "flash" and self.precision == "fp32":
            raise ConfigError("train.attention: flash needs train.precision=bf16; use sdpa for fp32")
        if self.attention == "flash" and self.document_mask:
            raise ConfigError("train.document_mask: flash cannot hide documents from each other; use attention=sdpa")

    def check_world_size(self, world_size: int, schedule: ScheduleConfig) -> None:
        """Refuse a global batch, at any point of its ramp, that cannot be cut into equal micro-batches.

        Raises:
            ConfigError: with the nearest number of sequences that can.
        """
        quantum = world_size * self.micro_batch_size
        sizes = {"train.global_batch_size": self.global_batch_size}
        if schedule.batch_start is not None:
            sizes["schedule.batch_start"] = schedule.batch_start
            sizes["schedule.batch_increment"] = schedule.batch_increment
        for key, size in sizes.items():
            if size % quantum:
                nearest = max(1, round(size / quantum)) * quantum
                raise ConfigError(
                    f"{key}: {size} is not a multiple of {world_size} ranks x train.micro_batch_size"
                    f" {self.micro_batch_size}; nearest valid value: {nearest}"
                )


def train(
    config: RunConfig, world: World, on_step: Callable[[Record], None] = lambda record: None
) -> tuple[ExitCode, str]:
    """Train or resume the run in `config.run_dir`; a collective of all ranks.

    Args:
        config: the resolved configuration, equal on all ranks.
        world: the ranks.
        on_step: called on rank 0 with the record of every completed step.

    Returns:
        How it ended, and why in words.

    Raises:
        ConfigError, DataError, CheckpointError: bad input; on every rank, before anything was written.
        RunError: a rank found its input damaged in mid-run.
    """
    with StopSignals() as signals:
        start = prepare(config, world)
        saved = Progress() if start.reader is None else start.reader.manifest.progress
        if saved.step >= config.train.steps:
            return ExitCode.FINISHED, f"finished before, at step {saved.step}; nothing to do"
        device = start_process_group(world)
        try:
            run = Training(config, world, start.data, device, fresh=start.reader is None)
            with closing(run), attempt(config, world, device, start) as log:
                run.begin(start.reader, log)
                code, reason = run.loop(signals, on_step)
                if log is not None:
                    log.outcome(code, reason, step=run.progress.step)
        finally:
            stop_process_group()
    return code, reason


class Training:
    """A run in progress on one rank.

    Attributes:
        progress: counters of the completed steps.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        data: TrainingData,
        device: torch.device,
        *,
        fresh: bool,
    ) -> None:
        self.progress = Progress()
        self._config, self._world, self._data, self._device = config, world, data, device
        self._log: RunLog | None = None
        self._run_dir = Path(config.run_dir)
        self._loader = Loader(data, config.train.micro_batch_size)
        self._agenda = Agenda(config, world.rank, world.size)
        with device:
            model = RecurrentDepthModel(
                config.model, config.train.attention, config.train.checkpoint_iterations, config.objective
            )
        model.init_weights(config.seed, config.depth.mean_recurrence)
        self._left_fresh: list[str] = []
        if fresh and config.init_from.path is not None:
            with world.guard("init_from"):
                self._left_fresh = load_pretrained(config, model)
        self._shapes = {reference_name(name): list(value.shape) for name, value in model.named_parameters()}
        self._engine = build_engine(
            model,
            build_optimizer(config.optimizer, model),
            stage=config.zero.stage,
            precision=config.train.precision,
            gradient_clipping=config.optimizer.gradient_clipping,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
        )

    def begin(self, reader: CheckpointReader | None, log: RunLog | None) -> None:
        """Log to `log`, if any, and take weights, optimizer state and counters from a checkpoint, if any.

        The checkpoint may be of any world size and ZeRO stage.
        """
        self._log = log
        if reader is not None:
            self._restore(reader)
        elif self._config.init_from.path is not None:
            self._event("init_from", path=self._config.init_from.path, not_in_it=self._left_fresh)

    def _restore(self, reader: CheckpointReader) -> None:
        manifest = reader.manifest
        with self._world.guard("checkpoint load"), torch.no_grad():
            if manifest.optimizer_state:
                allocate_optimizer_state(self._engine, manifest.optimizer_state, manifest.progress.step)
            for fragment in local_fragments(self._engine):
                numel = fragment.weight.numel()
                fragment.weight.copy_(reader.slice(fragment.parameter, WEIGHT, fragment.start, numel))
                for name, tensor in fragment.optimizer_state.items():
                    tensor.copy_(reader.slice(fragment.parameter, name, fragment.start, numel))
        publish_weights(self._engine)
        self.progress = manifest.progress

    def close(self) -> None:
        """End what reads ahead."""
        self._loader.close()

    def loop(self, signals: StopSignals, on_step: Callable[[Record], None]) -> tuple[ExitCode, str]:
        """Train to the last step, a stop signal or a non-finite loss; return how it ended and why."""
        config = self._config
        while self.progress.step < config.train.steps:
            tokens_before = self.progress.tokens
            record, stop_requests = self._step(signals.received)
            trained = self.progress.tokens > tokens_before
            if not trained:
                self._event("no_targets", step=record["step"], reason="loss masks leave out every token of the batch")
            if self._log is not None:
                self._log.step(record)
                on_step(record)
            if not (math.isfinite(record["grad_norm"]) and (math.isfinite(record["loss"]) or not trained)):
                return ExitCode.DIVERGED, self._diverged(record)
            finished = self.progress.step == config.train.steps
            if stop_requests or finished or self.progress.step % config.checkpoint.every == 0:
                self._save()
            if stop_requests and not finished:
                self._event("stop_signal", step=record["step"], ranks=stop_requests)
                return ExitCode.STOPPED, f"stop signal on {stop_requests} rank(s), saved at step {record['step']}"
        return ExitCode.FINISHED, "all steps done"

    def _step(self, stop: bool) -> tuple[Record, int]:
        """Do one optimizer step; return its record and the number of ranks that were asked to stop."""
        config, number, started = self._config, self.progress.step, time.perf_counter()
        upcoming = self._agenda.upcoming(number, self.progress.samples, config.data.prefetch)
        step = upcoming[0]
        set_learning_rate(self._engine, step.learning_rate)
        trace = Trace() if self._log is not None and (number + 1) % config.train.probe_every == 0 else None
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        tokens, gradient_norm = 0, math.nan
        batches = self._batches(upcoming)
        set_accumulation(self._engine, len(batches))
        counts = [batch.trained_tokens for batch in batches]
        mean_tokens = self._mean_trained_tokens(counts)
        for index, (batch, depth, trained) in enumerate(zip(batches, step.depths, counts, strict=True)):
            objective = self._forward(batch, depth, trace if index == 0 else None)
            # Every token of the global batch weighs the same, however padding and masks fall on micro-batches.
            self._engine.backward(objective * (trained / mean_tokens))
            loss_sum += self._engine.module.cross_entropy.double() * trained
            gradient_norm = optimizer_step(self._engine, config.optimizer.gradient_clipping)
            tokens += trained
        synchronize(self._device)
        total_loss, total_tokens, stop_requests = self._world.sum(np.array([float(loss_sum), tokens, stop]))
        seconds = time.perf_counter() - started
        self.progress = Progress(
            step=number + 1,
            samples=self.progress.samples + step.share.batch_size,
            tokens=self.progress.tokens + int(total_tokens),
        )
        record: Record = {
            **dataclasses.asdict(self.progress),
            "time": time.time(),
            "loss": total_loss / total_tokens if total_tokens else math.nan,
            "grad_norm": gradient_norm,
            "lr": step.learning_rate,
            **_depth_record(step),
            "seconds": seconds,
            "tokens_per_second": total_tokens / seconds,
            **(trace.to_lists() if trace is not None else {}),
        }
        return record, int(stop_requests)

    def _batches(self, upcoming: list[Step]) -> list[MicroBatch]:
        """Return the micro-batches of the first of these steps, while those of the others are read."""
        share, *ahead = (step.share for step in upcoming)
        batches = self._loader.micro_batches(share, ahead)
        objective = self._config.objective
        return [batch._replace(labels=goldfish_labels(batch.labels, batch.input_ids, objective)) for batch in batches]

    def _diverged(self, record: Record) -> str:
        reason = f"loss {record['loss']} and gradient norm {record['grad_norm']} at step {record['step']}"
        self._event("non_finite", step=record["step"], reason=reason)
        saved = list_checkpoints(self._run_dir)
        # Weights may have been blown up, though finite, when they were saved.
        advice = f"; if that fails at once, move {saved[-1].name} away first" if saved else ""
        return f"{reason}; start again with a lower optimizer.learning_rate{advice}"

    def _forward(self, batch: MicroBatch, depth: Depth | list[Depth], trace: Trace | None) -> torch.Tensor:
        keys = torch.tensor([stream_key(self._config.seed, "state", int(sample)) for sample in batch.samples])
        state = self._engine.module.initial_state(keys.to(self._device), batch.input_ids.shape[1])
        input_ids, labels = batch.input_ids.to(self._device), batch.labels.to(self._device)
        documents = batch.documents.to(self._device) if self._config.train.document_mask else None
        objective: torch.Tensor = self._engine(input_ids, state, depth, labels, trace, documents)
        return objective

    def _mean_trained_tokens(self, counts: list[int]) -> float:
        """Return the mean number of trained tokens of a micro-batch, over all ranks; `counts` are this rank's."""
        own = np.array([sum(counts), len(counts)], dtype=np.float64)
        known = self._data.trains_on_all and self._config.objective.goldfish == 0
        tokens, number = own if known else self._world.sum(own)
        return float(max(tokens, 1.0) / number)

    def _save(self) -> None:
        started = time.perf_counter()
        path = save_checkpoint(
            self._run_dir,
            self._world,
            owned_fragments(self._engine, self._world.rank),
            self._shapes,
            progress=self.progress,
            config=dataclasses.asdict(self._config),
            data_fingerprint=self._data.mixture.fingerprint(self.progress.samples),
            tokenizer_sha256=self._data.tokenizer_sha256,
        )
        if self._log is not None:
            removed = prune_checkpoints(self._run_dir, path, self._config.checkpoint.keep_last)
            seconds = time.perf_counter() - started
            self._event("checkpoint", step=self.progress.step, path=path.name, removed=removed, seconds=seconds)

    def _event(self, kind: str, **fields: Any) -> None:
        if self._log is not None:
            self._log.event(kind, **fields)


def _depth_record(step: Step) -> Record:
    """Return (n, k) of the step; of several depths the rounded means, and how often each r was drawn."""
    mean = np.rint(np.mean(step.drawn, axis=0)).astype(int).tolist()
    counts = Counter(sum(depth) for depth in step.drawn)
    several = {"depths": {str(r): counts[r] for r in sorted(counts)}} if len(step.drawn) > 1 else {}
    return {"num_steps": mean, **several}


class StopSignals:
    """Turns SIGTERM, SIGUSR1 and SIGINT into a flag; the ranks agree on it at the end of a step."""

    _SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        with suppress(ValueError):  # only the main thread may install handlers
            self._previous = {number: signal.signal(number, self._receive) for number in self._SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.received = True
