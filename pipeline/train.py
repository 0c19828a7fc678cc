"""The training loop. Step t is a pure function of (configuration, seed, t), so to resume is to seek to t."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_prep.world import World
from kernels.attention import backend_problem
from monitoring.runlog import Record, RunLog, write_atomic
from pipeline.accelerator import describe, synchronize
from pipeline.checkpoint import (
    WEIGHT,
    CheckpointManifest,
    CheckpointReader,
    Progress,
    newest_valid,
    prune_checkpoints,
    save_checkpoint,
)
from pipeline.depth import draw_depth
from pipeline.engine import (
    allocate_optimizer_state,
    build_engine,
    local_fragments,
    optimizer_step,
    set_learning_rate,
    start_process_group,
    stop_process_group,
)
from pipeline.errors import CheckpointError, ConfigError, ExitCode
from pipeline.loader import Loader, MicroBatch, TrainingData, open_training_data
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
        if problem := backend_problem(self.attention):
            raise ConfigError(f"train.attention: {problem}")

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


def train(config: RunConfig, world: World, on_step: Callable[[Record], None] = lambda record: None) -> ExitCode:
    """Train or resume the run in `config.run_dir`; a collective of all ranks.

    Args:
        config: the resolved configuration, equal on all ranks.
        world: the ranks.
        on_step: called on rank 0 with the record of every completed step.

    Raises:
        ConfigError, DataError, CheckpointError: bad input; on every rank, before anything was written.
    """
    run_dir = Path(config.run_dir)
    with world.guard("configuration"):
        config.train.check_world_size(world.size)
        # One rank reads the manifests; thousands that look at every shard bring a file system down.
        opened = open_training_data(config) if world.rank == 0 else None
    data = world.broadcast(opened)
    assert data is not None
    with world.guard("dataset"):
        data.check_shards(world.rank, world.size)
    with world.guard("checkpoint selection"):
        found, problems = _find_checkpoint(run_dir) if world.rank == 0 else (None, {})
    found = world.broadcast(found)
    with world.guard("checkpoint opening"):
        reader = None if found is None else CheckpointReader(found, verify=False)
        changes = {} if reader is None else check_resumable(reader.manifest, config, data)
    if reader is not None and reader.manifest.progress.step >= config.train.steps:
        return ExitCode.FINISHED
    with world.guard("run directory"):
        log = _open_log(config, world.size) if world.rank == 0 else None
    try:
        device = start_process_group(world)
        _record_environment(log, world, device)
        run = Training(config, world, data, device, log, on_step)
        if reader is not None:
            run.restore(reader)
        if log is not None:
            log.event("start", step=run.progress.step, changed=changes, passed_over=problems)
        code, reason = run.loop()
        if log is not None:
            log.outcome(code, reason, step=run.progress.step)
        return code
    except Exception as error:
        if log is not None:
            log.outcome(12 if isinstance(error, ValueError) else 1, f"{type(error).__name__}: {error}")
        raise
    finally:
        if log is not None:
            log.close()
        stop_process_group()


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
        log: RunLog | None,
        on_step: Callable[[Record], None],
    ) -> None:
        self.progress = Progress()
        self._config, self._world, self._data, self._device = config, world, data, device
        self._log, self._on_step = log, on_step
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
            for fragment in local_fragments(self._engine, self._world.rank):
                numel = fragment.weight.numel()
                fragment.weight.copy_(reader.slice(fragment.parameter, WEIGHT, fragment.start, numel))
                for name, tensor in fragment.optimizer_state.items():
                    tensor.copy_(reader.slice(fragment.parameter, name, fragment.start, numel))
            for name, parameter in self._engine.module.named_parameters():
                parameter.copy_(reader.weight(reference_name(name)))
        self.progress = manifest.progress

    def loop(self) -> tuple[ExitCode, str]:
        """Train to the last step, a stop signal or a non-finite loss; return how it ended and why."""
        config = self._config
        with StopSignals() as signals, closing(self._loader):
            while self.progress.step < config.train.steps:
                record, stop_requests = self._step(signals.received)
                if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
                    reason = f"loss {record['loss']} and gradient norm {record['grad_norm']} at step {record['step']}"
                    self._event("non_finite", step=record["step"], reason=reason)
                    return ExitCode.DIVERGED, f"{reason}; lower optimizer.learning_rate and start again"
                finished = self.progress.step == config.train.steps
                if stop_requests or finished or self.progress.step % config.checkpoint.every == 0:
                    self._save()
                if stop_requests and not finished:
                    self._event("stop_signal", step=record["step"], ranks=stop_requests)
                    return ExitCode.STOPPED, f"stop signal on {stop_requests} rank(s)"
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
        if self._log is not None:
            self._log.step(record)
            self._on_step(record)
        return record, int(stop_requests)

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
            local_fragments(self._engine, self._world.rank),
            self._shapes,
            progress=self.progress,
            config=dataclasses.asdict(self._config),
            data_fingerprint=self._data.mixture.fingerprint(self.progress.samples),
            tokenizer_sha256=self._data.tokenizer_sha256,
        )
        if self._log is not None:
            removed = prune_checkpoints(self._run_dir, self._config.checkpoint.keep_last)
            self._event(
                "checkpoint",
                step=self.progress.step,
                path=path.name,
                removed=removed,
                seconds=time.perf_counter() - started,
            )

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


def check_resumable(saved: CheckpointManifest, config: RunConfig, data: TrainingData) -> dict[str, list[Any]]:
    """Return what changed in the configuration since the checkpoint: dotted path -> [then, now].

    Raises:
        CheckpointError: the model's shape, the seed, the tokenizer or the training data so far changed.
    """
    changes = _differences(saved.config, dataclasses.asdict(config))
    for key, (then, now) in changes.items():
        if key == "seed" or key.startswith("model."):
            raise CheckpointError(
                f"{key}: the checkpoints of {config.run_dir} have {then!r}, the configuration {now!r};"
                " set it back or choose another run_dir"
            )
    for what, then, now in (
        ("tokenizer", saved.tokenizer_sha256, data.tokenizer_sha256),
        ("training data", saved.data_fingerprint, data.mixture.fingerprint(saved.progress.samples)),
    ):
        if then != now:
            directories = ", ".join(map(str, data.directories))
            raise CheckpointError(
                f"data.train: the {what} of {directories} is not the one that {config.run_dir} was trained on so far"
                f" ({then[:12]} then, {now[:12]} now); name the old datasets, weights and limits, or choose another"
                " run_dir"
            )
    return changes


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> dict[str, list[Any]]:
    changes: dict[str, list[Any]] = {}
    for key in before.keys() | after.keys():
        then, now = before.get(key), after.get(key)
        if isinstance(then, dict) and isinstance(now, dict):
            changes |= _differences(then, now, f"{prefix}{key}.")
        elif then != now:
            changes[prefix + key] = [then, now]
    return dict(sorted(changes.items()))


def _find_checkpoint(run_dir: Path) -> tuple[Path | None, dict[str, str]]:
    reader, problems = newest_valid(run_dir)
    if reader is None and problems:
        raise CheckpointError(
            f"{run_dir}: none of its checkpoints is intact ({'; '.join(problems.values())});"
            " restore one, or choose another run_dir to start anew"
        )
    return (None if reader is None else reader.directory), problems


def _open_log(config: RunConfig, world_size: int) -> RunLog:
    from pipeline.config import to_yaml

    run_dir, tokenizer = Path(config.run_dir), Path(config.data.tokenizer)
    log = RunLog.open(run_dir)
    resolved = to_yaml(config).encode()
    write_atomic(run_dir / "run.yaml", resolved)
    write_atomic(log.attempt_dir / "run.yaml", resolved)
    if not (run_dir / "tokenizer").exists():
        shutil.copytree(tokenizer, run_dir / "tokenizer")
    return log


def _record_environment(log: RunLog | None, world: World, device: torch.device) -> None:
    """Write which process on which host is which rank, and in which versions, into the attempt's directory."""
    ranks = world.gather({"host": socket.gethostname(), "pid": os.getpid(), **describe(device)})
    if log is None:
        return
    packages = {name: version(name) for name in ("torch", "deepspeed", "mpi4py", "zarr", "numpy")}
    environment = {"command": sys.argv, "python": sys.version.split()[0], "packages": packages, "ranks": ranks}
    write_atomic(log.attempt_dir / "environment.json", json.dumps(environment, indent=1).encode())
