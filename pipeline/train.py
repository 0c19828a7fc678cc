"""The training loop. Step t is a pure function of (configuration, seed, t), so to resume is to seek to t."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
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
from pipeline.attempt import attempt, prepare
from pipeline.checkpoint import (
    WEIGHT,
    CheckpointReader,
    Progress,
    list_checkpoints,
    prune_checkpoints,
    save_checkpoint,
)
from pipeline.depth import draw_depth
from pipeline.engine import (
    allocate_optimizer_state,
    build_engine,
    local_fragments,
    optimizer_step,
    owned_fragments,
    publish_weights,
    set_learning_rate,
    start_process_group,
    stop_process_group,
)
from pipeline.errors import ConfigError, ExitCode
from pipeline.loader import Loader, MicroBatch, TrainingData
from pipeline.model import RecurrentDepthModel, Trace, reference_name, stream_key
from pipeline.optim import build_optimizer, learning_rate

if TYPE_CHECKING:
    from pipeline.config import RunConfig

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

    def check_world_size(self, world_size: int) -> None:
        """Refuse a global batch that cannot be cut into equal micro-batches.

        Raises:
            ConfigError: with the nearest global batch that can.
        """
        quantum = world_size * self.micro_batch_size
        if self.global_batch_size % quantum:
            nearest = max(1, round(self.global_batch_size / quantum)) * quantum
            raise ConfigError(
                f"train.global_batch_size: {self.global_batch_size} is not a multiple of {world_size} ranks x"
                f" train.micro_batch_size {self.micro_batch_size}; nearest valid value: {nearest}"
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
            run = Training(config, world, start.data, device)
            with closing(run), attempt(config, world, device, start) as log:
                if start.reader is not None:
                    run.restore(start.reader)
                code, reason = run.loop(signals, log, on_step)
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
    ) -> None:
        self.progress = Progress()
        self._config, self._world, self._data, self._device = config, world, data, device
        self._log: RunLog | None = None
        self._run_dir = Path(config.run_dir)
        self._loader = Loader(
            data,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            prefetch=config.data.prefetch,
        )
        with device:
            model = RecurrentDepthModel(config.model, config.train.attention, config.train.checkpoint_iterations)
        model.init_weights(config.seed, config.depth.mean_recurrence)
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

    def restore(self, reader: CheckpointReader) -> None:
        """Take weights, optimizer state and counters from a checkpoint of any world size and ZeRO stage."""
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

    def loop(self, signals: StopSignals, log: RunLog | None, on_step: Callable[[Record], None]) -> tuple[ExitCode, str]:
        """Train to the last step, a stop signal or a non-finite loss; return how it ended and why."""
        config = self._config
        self._log = log
        while self.progress.step < config.train.steps:
            record, stop_requests = self._step(signals.received)
            if log is not None:
                log.step(record)
                on_step(record)
            if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
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
        config, step, started = self._config, self.progress.step, time.perf_counter()
        depth = draw_depth(config.depth, config.seed, step)
        rate = learning_rate(config.optimizer, step, config.train.steps)
        set_learning_rate(self._engine, rate)
        trace = Trace() if self._log is not None and (step + 1) % config.train.probe_every == 0 else None
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        tokens, gradient_norm = 0, math.nan
        batches = self._loader.micro_batches(self.progress.samples, self._world.rank, self._world.size)
        mean_tokens = self._mean_trained_tokens(batches)
        for index, batch in enumerate(batches):
            loss = self._forward(batch, depth, trace if index == 0 else None)
            # Every token of the global batch weighs the same, however padding and masks fall on micro-batches.
            self._engine.backward(loss * (batch.trained_tokens / mean_tokens))
            gradient_norm = optimizer_step(self._engine, config.optimizer.gradient_clipping)
            loss_sum += loss.detach().double() * batch.trained_tokens
            tokens += batch.trained_tokens
        synchronize(self._device)
        total_loss, total_tokens, stop_requests = self._world.sum(np.array([float(loss_sum), tokens, stop]))
        seconds = time.perf_counter() - started
        self.progress = Progress(
            step=step + 1,
            samples=self.progress.samples + config.train.global_batch_size,
            tokens=self.progress.tokens + int(total_tokens),
        )
        record: Record = {
            **dataclasses.asdict(self.progress),
            "time": time.time(),
            "loss": total_loss / total_tokens,
            "grad_norm": gradient_norm,
            "lr": rate,
            "num_steps": list(depth),
            "seconds": seconds,
            "tokens_per_second": total_tokens / seconds,
            **(trace.to_lists() if trace is not None else {}),
        }
        return record, int(stop_requests)

    def _diverged(self, record: Record) -> str:
        reason = f"loss {record['loss']} and gradient norm {record['grad_norm']} at step {record['step']}"
        self._event("non_finite", step=record["step"], reason=reason)
        saved = list_checkpoints(self._run_dir)
        # Weights may have been blown up, though finite, when they were saved.
        advice = f"; if that fails at once, move {saved[-1].name} away first" if saved else ""
        return f"{reason}; start again with a lower optimizer.learning_rate{advice}"

    def _forward(self, batch: MicroBatch, depth: tuple[int, int], trace: Trace | None) -> torch.Tensor:
        keys = torch.tensor([stream_key(self._config.seed, "state", int(sample)) for sample in batch.samples])
        state = self._engine.module.initial_state(keys.to(self._device), batch.input_ids.shape[1])
        input_ids = batch.input_ids.to(self._device)
        # Nothing to train on: the loss will weigh nothing, but a mean over no label would be nan.
        labels = batch.labels.to(self._device) if batch.trained_tokens else input_ids
        loss: torch.Tensor = self._engine(input_ids, state, depth, labels, trace)
        return loss

    def _mean_trained_tokens(self, batches: list[MicroBatch]) -> float:
        """Return the mean number of trained tokens of a micro-batch, over all ranks."""
        counts = np.array([sum(batch.trained_tokens for batch in batches), len(batches)], dtype=np.float64)
        tokens, number = counts if self._data.trains_on_all else self._world.sum(counts)
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
