"""The training loop. Step t is a pure function of (configuration, seed, t), so to resume is to seek to t."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data_prep.world import World
from kernels.attention import BACKENDS
from monitoring.crashes.report import write_crash_report
from monitoring.runlog import Record
from pipeline.attempt import attempt, prepare, record_unhealthy_start
from pipeline.compilation import CompileConfig
from pipeline.control import RunControl, StopSignals
from pipeline.engine import check_precision
from pipeline.errors import ConfigError, ExitCode, UnhealthyNodeError
from pipeline.journal import journal
from pipeline.launch import start_process_group, stop_process_group
from pipeline.node_check import check_demands
from pipeline.profiling import ProfileConfig
from pipeline.recompute import POLICIES
from pipeline.training import Training
from pipeline.watchdog import Watchdog

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.schedules import ScheduleConfig

PRECISIONS = ("fp32", "bf16", "fp16")


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
    """fp32, or bf16 or fp16 with float32 master weights and gradient sums; fp16 scales the loss."""
    attention: str = "sdpa"
    """Attention backend: sdpa, or flash where flash-attn is installed."""
    activation_checkpointing: str = "none"
    """What of the core the backward pass computes again: none, each iteration, each block, or selective (all but
    matrix products and attention)."""
    compile: CompileConfig = field(default_factory=CompileConfig)
    document_mask: bool = False
    """Hide the documents of a row from each other; needs attention sdpa."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name in ("steps", "global_batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}: {getattr(self, name)} is not positive")
        self.profile.check(self.steps)
        if self.precision not in PRECISIONS:
            raise ConfigError(f"train.precision: {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.attention not in BACKENDS:
            raise ConfigError(f"train.attention: {self.attention!r} is not one of {', '.join(BACKENDS)}")
        if self.activation_checkpointing not in POLICIES:
            raise ConfigError(
                f"train.activation_checkpointing: {self.activation_checkpointing!r} is not one of {', '.join(POLICIES)}"
            )
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
    config: RunConfig,
    world: World,
    on_step: Callable[[Record], None] = lambda record: None,
    on_alarm: Callable[[str], None] = lambda text: None,
    signals: StopSignals | None = None,
) -> tuple[ExitCode, str]:
    """Train or resume the run in `config.run_dir`; a collective of all ranks.

    Args:
        config: the resolved configuration, equal on all ranks.
        world: the ranks.
        on_step: called on rank 0 with the record of every completed step.
        on_alarm: called on rank 0 with what a person should know of at once, while the training goes on.
        signals: what this process is told while it trains; None if nobody listens.

    Returns:
        How it ended, and why in words.

    Raises:
        ConfigError, DataError, CheckpointError: bad input; on every rank, before anything was written.
        RunError: a rank found its input damaged in mid-run.
    """
    control = RunControl(config.control, world, signals or StopSignals())
    start = prepare(config, world)
    if world.rank == 0:
        for problem in start.found.problems.values():
            on_alarm(f"passed over: {problem}")
    if start.progress.step >= config.train.steps:
        start.found.open(world, Path(config.run_dir), other_owners=config.checkpoint.other_owners)
        return ExitCode.FINISHED, f"finished before, at step {start.progress.step}; nothing to do"
    with _process_group(config, world) as device, attempt(config, world, device, start, on_alarm) as place:
        watchdog = Watchdog(config.control, world, journal, place.directory)
        with (
            watchdog,
            Training(config, world, start, device, place, control, watchdog, on_alarm) as run,
            journal.phase("between steps"),
        ):
            ending = run.loop(on_step)
        if place.log is not None:
            with suppress(OSError):  # a full disk: the exit code says it too
                place.log.outcome(ending.code, ending.reason, step=run.progress.step, **ending.fields)
            if ending.code is ExitCode.DIVERGED:
                write_crash_report(place.log.run_dir, place.log.attempt)
    return ending.code, ending.reason


@contextmanager
def _process_group(config: RunConfig, world: World) -> Iterator[torch.device]:
    """Yield this rank's device, with the collective library and the journals at work."""
    try:
        device = start_process_group(world, config.comm)
    except UnhealthyNodeError as error:
        record_unhealthy_start(config, world, error)
        raise
    try:
        world.note = journal.collective
        journal.share(world)
        journal.watch_deepspeed()
        with world.guard("precision"):
            check_precision(config.train.precision, device)
        check_demands(config.node_check, world, device, Path(config.run_dir))
        yield device
    except Exception:
        # Where one rank alone has failed the others wait in a collective: to leave would take as long, or tell them
        # of a broken connection before they are ended with this rank's message.
        if world.size == 1 or world.failed_together:
            stop_process_group()
        raise
    stop_process_group()
