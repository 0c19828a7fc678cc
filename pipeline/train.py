"""The training loop. Step t is a pure function of (configuration, seed, t), so to resume is to seek to t."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_prep.world import World
from kernels.attention import BACKENDS
from monitoring.runlog import Record
from pipeline.accounting import Accounting
from pipeline.agenda import Agenda, Step
from pipeline.attempt import Attempt, Start, attempt, prepare, record_unhealthy_start
from pipeline.checkpoints.health import Health
from pipeline.checkpoints.manifest import CheckpointManifest, Progress, list_checkpoints
from pipeline.checkpoints.proof import ProbeBatch, compare
from pipeline.checkpoints.restart import fill
from pipeline.checkpoints.saver import Saver
from pipeline.compilation import CompileConfig, use_compiled_core
from pipeline.control import Cause, Flag, RunControl, StopSignals
from pipeline.ending import Ending, cause_fields, diverged, ended
from pipeline.engine import (
    build_engine,
    check_precision,
    loss_scale_state,
    owned_fragments,
    publish_weights,
    release_gathered,
    step_skipped,
)
from pipeline.errors import ConfigError, ExitCode, UnhealthyNodeError
from pipeline.journal import journal
from pipeline.launch import start_process_group, stop_process_group
from pipeline.model import RecurrentDepthModel, reference_name
from pipeline.node_check import check_demands, check_nodes
from pipeline.optim import build_optimizer
from pipeline.pretrained import load_pretrained
from pipeline.profiling import ProfileConfig, StepProfiler
from pipeline.recompute import POLICIES
from pipeline.recurrence import Trace
from pipeline.sample_hash import roll
from pipeline.step import Stepper
from pipeline.timing import StepClock
from pipeline.validation import Validation
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
    probe_every: int = 10
    """Steps between measurements of the recurrent state on one micro-batch."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name in ("steps", "global_batch_size", "micro_batch_size", "probe_every"):
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


class Training:
    """A run in progress on one rank; a context that ends what reads ahead.

    The checkpoint that it starts from, if any, may be of any world size and ZeRO stage.

    Attributes:
        progress: counters of the completed steps.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        start: Start,
        device: torch.device,
        place: Attempt,
        control: RunControl,
        watchdog: Watchdog,
        on_alarm: Callable[[str], None],
    ) -> None:
        self.progress = Progress()
        self._on_alarm = on_alarm
        self._config, self._world, self._data, self._device = config, world, start.data, device
        self._log, self._control, self._watchdog = place.log, control, watchdog
        self._attempt = int(place.directory.name)
        self._run_dir = Path(config.run_dir)
        self._profiler = StepProfiler(config.train.profile, place.directory if world.rank == 0 else None, world.rank)
        with watchdog.limit(config.control.hang_start_minutes * 60.0):
            with journal.phase("node check"):
                place.note(node_check=check_nodes(config.node_check, world, device, self._run_dir))
            with journal.phase("build"):
                self._build(fresh=start.found.manifest is None)
            with journal.phase("load"):
                self._restore(start)
            with journal.phase("checkpoint tiers"):
                self._saver = self._open_saver(start, place.run_id)
        self._first = self.progress.step

    def _build(self, *, fresh: bool) -> None:
        config, world = self._config, self._world
        self._agenda = Agenda(config, world.rank, world.size)
        with self._device:
            model = RecurrentDepthModel(
                config.model, config.train.attention, config.train.activation_checkpointing, config.objective
            )
        self._kernels = use_compiled_core(config, model, self._device) if config.train.compile.enabled else None
        if self._kernels is not None and self._kernels.passed_over is not None:
            self._event("kernels_passed_over", reason=self._kernels.passed_over)
        model.init_weights(config.seed, config.depth.mean_recurrence)
        if fresh and config.init_from.path is not None:
            with world.guard("init_from"):
                left_fresh = load_pretrained(config, model)
            self._event("init_from", path=config.init_from.path, not_in_it=left_fresh)
        self._shapes = {reference_name(name): list(value.shape) for name, value in model.named_parameters()}
        self._engine = build_engine(
            model,
            build_optimizer(config.optimizer, model),
            zero=config.zero,
            comm=config.comm,
            precision=config.train.precision,
            gradient_clipping=config.optimizer.gradient_clipping,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            world=world,
        )
        self._clock = StepClock(self._device)
        self._stepper = Stepper(
            config, self._engine, self._data, self._control, self._watchdog, self._clock, self._device
        )
        if self._kernels is not None:
            self._stepper.warm_up(self._data.manifests[0].sequence_length)
        self._validation = Validation(config, world, self._device)
        self._accounting = Accounting(config, self._data.manifests[0].sequence_length, world.size, self._device)
        with world.guard("probe batch"):
            self._probe = ProbeBatch(config, self._data, self._device)
        self._health = Health()
        self._validated: dict[str, Any] = {}

    def _restore(self, start: Start) -> None:
        """Load what the run goes on from, if anything, and prove that the model is the one that was saved."""
        saved, settings = start.found.manifest, self._config.checkpoint
        if saved is None:
            return
        reader = start.found.open(self._world, self._run_dir, other_owners=settings.other_owners)
        with self._world.guard("checkpoint load"):
            fill(self._engine, reader)
        publish_weights(self._engine)
        self.progress, self._validated = saved.progress, saved.validation
        found = self._probe.ask(self._engine)
        with self._world.guard("proof"):
            pairs = compare(saved.proof, found, settings.proof_tolerance)
        self._event("loaded", step=self.progress.step, path=str(reader.directory), proof=pairs)

    def _open_saver(self, start: Start, run_id: str) -> Saver:
        self._run_id, rank = run_id, self._world.rank
        saver = Saver(
            self._config.checkpoint,
            self._world,
            self._run_dir,
            run_id,
            lambda: owned_fragments(self._engine, rank),
            self._saver_event,
        )
        saver.seconds = self._control.save_seconds = start.history.save_seconds
        saver.go_on_from(self.progress.step, promoted=start.found.candidate is not None)
        self._stepper.reports = saver.reports
        if self.progress.step:  # else the optimizer has no state yet
            saver.prepare()
        return saver

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stepper.close()
        self._validation.close()
        self._saver.close()

    def loop(self, on_step: Callable[[Record], None]) -> Ending:
        """Train to the last step, an agreement to end, or a non-finite loss; return how it ended and why."""
        ending = self._train(on_step)
        self._end_profile()
        return ending

    def _train(self, on_step: Callable[[Record], None]) -> Ending:
        config = self._config
        while self.progress.step < config.train.steps:
            tokens_before = self.progress.tokens
            record, cause, reports = self._step()
            trained = self.progress.tokens > tokens_before
            if not trained:
                self._event("no_targets", step=record["step"], reason="loss masks leave out every token of the batch")
            # Loss scaling looks for the largest scale that does not overflow; without it nothing may.
            skipped = config.train.precision == "fp16" and step_skipped(self._engine)
            if skipped:
                self._event("loss_scale", step=record["step"], **loss_scale_state(self._engine))
            if self._validation.due(self.progress.step) and cause is None:  # a run that is told to end may have no time
                record |= self._validate()
            self._health.note(record)
            record["phases"] = self._accounting.phases(self._clock)
            if self._log is not None:
                self._log.step(record)
                on_step(record)
            finite = math.isfinite(record["grad_norm"]) and (math.isfinite(record["loss"]) or not trained)
            if not finite and not skipped:
                return self._diverged(record, cause)
            if self.progress.step in config.train.profile.steps[1:]:
                self._end_profile()
            stop = cause if cause is not None and cause.flag is not Flag.NON_FINITE else None
            finished = self.progress.step == config.train.steps
            if stop or finished:
                return self._end(stop if not finished else None)
            self._save(reports)
            if self.progress.step == self._first + 1:
                self._saver.prepare()
                self._keep_kernels()
        raise AssertionError("a run that has no steps left is not started")

    def _step(self) -> tuple[Record, Cause | None, list[float]]:
        """Do one step; return its record, why all ranks agreed to end after it, if they did, and the saver's sums."""
        config, number, started = self._config, self.progress.step + 1, time.perf_counter()
        upcoming = self._agenda.upcoming(number - 1, self.progress.samples, config.data.prefetch)
        step = upcoming[0]
        trace = Trace() if self._log is not None and number % config.train.probe_every == 0 else None
        self._profiler.before(number)
        result = self._stepper.do(number, upcoming, trace)
        seconds = time.perf_counter() - started
        self.progress = Progress(
            step=number,
            samples=self.progress.samples + step.share.batch_size,
            tokens=self.progress.tokens + result.tokens,
            sample_hash=roll(self.progress.sample_hash, result.sample_sums),
        )
        record: Record = {
            **dataclasses.asdict(self.progress),
            "time": time.time(),
            "loss": result.loss_sum / result.tokens if result.tokens else math.nan,
            "grad_norm": result.gradient_norm,
            "lr": step.learning_rate,
            **_depth_record(step),
            "seconds": seconds,
            "tokens_per_second": result.tokens / seconds,
            **self._accounting.record(step, seconds),
            **(trace.to_lists() if trace is not None else {}),
        }
        return record, result.cause, result.reports

    def _validate(self) -> Record:
        started, limit = time.perf_counter(), self._watchdog.limit(self._config.control.hang_save_minutes * 60.0)
        with limit, journal.phase("validation"), self._clock("validation"):
            record = self._validation.run(self._engine.module, self._engine.module)
            release_gathered(self._engine)
        self._control.validation_seconds = time.perf_counter() - started
        self._validated = {"step": self.progress.step, "loss": record["validation"]}
        return record

    def _end_profile(self) -> None:
        """Write the profile, if one is being recorded; the other ranks wait, lest they take rank 0 for hanging."""
        limit = self._watchdog.limit(self._config.control.hang_save_minutes * 60.0)
        with limit, journal.phase("profile"), self._world.guard("profile"):
            path = self._profiler.stop()
        if path is not None:
            self._event("profile", step=self.progress.step, path=str(path.relative_to(self._run_dir)))

    def _end(self, stop: Cause | None) -> Ending:
        """Save for the last time, after the last step or because of `stop`; return how the run ended."""
        step = self.progress.step
        if stop is not None:
            self._event("stop", step=step, **cause_fields(stop))
        with self._saving():
            problem = self._saver.save_last(self._draft)
            if problem is None and stop is None:
                self._saver.discard_node_tiers()
            self._keep_kernels()
        return ended(step, stop, problem, self._newest())

    def _diverged(self, record: Record, cause: Cause | None) -> Ending:
        with self._saving():
            self._saver.settle()
            # Nodes hold states so young that what has shown now may have begun before them.
            self._saver.discard_node_tiers()
        ending = diverged(record, cause, self._newest())
        self._event("non_finite", step=record["step"], reason=ending.reason, **ending.fields)
        return ending

    def _newest(self) -> str | None:
        """Return the name of the newest checkpoint, on rank 0."""
        saved = list_checkpoints(self._run_dir) if self._log is not None else []
        return saved[-1].name if saved else None

    def _save(self, reports: list[float]) -> None:
        """Go on with a checkpoint that is on its way, and begin one if it is due."""
        if self._saver.wanted(self.progress.step):
            with self._saving():
                self._saver.advance(reports)
                self._saver.save(self.progress.step, self._draft)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        limit = self._watchdog.limit(self._config.control.hang_save_minutes * 60.0)
        with limit, journal.phase("save"), self._clock("checkpoint"):
            yield
        self._control.save_seconds, self._control.saving = self._saver.seconds, self._saver.under_way

    def _draft(self) -> CheckpointManifest:
        """Return what a checkpoint of this step says beside its files; a collective."""
        return CheckpointManifest(
            progress=self.progress,
            config=dataclasses.asdict(self._config),
            data_fingerprint=self._data.mixture.fingerprint(self.progress.samples),
            tokenizer_sha256=self._data.tokenizer_sha256,
            shapes=self._shapes,
            run=self._run_id,
            attempt=self._attempt,
            loss_scale=loss_scale_state(self._engine),
            health=self._health.vector(),
            validation=self._validated,
            proof=self._probe.ask(self._engine),
        )

    def _keep_kernels(self) -> None:
        """Keep what was compiled for the next start; a run does not end because that cannot be written."""
        if self._log is not None and self._kernels is not None:
            try:
                self._kernels.publish()
            except OSError as error:
                self._event("kernels_not_kept", step=self.progress.step, reason=str(error))

    def _event(self, kind: str, **fields: Any) -> None:
        if self._log is not None:
            self._log.event(kind, **fields)

    def _saver_event(self, kind: str, **fields: Any) -> None:
        self._event(kind, **fields)
        if kind == "checkpoint_failed" and self._log is not None:
            self._on_alarm(f"step {fields['step']} is not saved ({fields['tier']}): {fields['reason']}")


def _depth_record(step: Step) -> Record:
    """Return (n, k) of the step; of several depths the rounded means, and how often each r was drawn."""
    mean = np.rint(np.mean(step.drawn, axis=0)).astype(int).tolist()
    counts = Counter(sum(depth) for depth in step.drawn)
    several = {"depths": {str(r): counts[r] for r in sorted(counts)}} if len(step.drawn) > 1 else {}
    return {"num_steps": mean, **several}
