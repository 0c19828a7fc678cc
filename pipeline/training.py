"""A run in progress on one rank: steps, what follows each of them, and the ways in which it can end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from monitoring.policy import Decision
from monitoring.runlog import Record, read_events
from pipeline.accounting import Accounting
from pipeline.agenda import Agenda
from pipeline.checkpoints.health import Health
from pipeline.checkpoints.manifest import CheckpointManifest, Progress, list_checkpoints
from pipeline.checkpoints.proof import ProbeBatch, compare
from pipeline.checkpoints.restart import Found, fill
from pipeline.checkpoints.saver import Saver
from pipeline.compilation import use_compiled_core
from pipeline.control import Cause, Flag, RunControl
from pipeline.depth_gain import DepthGain
from pipeline.ending import Ending, cause_fields, diverged, ended, gave_up
from pipeline.engine import (
    build_engine,
    loss_scale_state,
    owned_fragments,
    publish_weights,
    release_gathered,
    step_skipped,
)
from pipeline.errors import ExitCode
from pipeline.journal import journal
from pipeline.model import RecurrentDepthModel, reference_name
from pipeline.node_check import check_nodes
from pipeline.optim import build_optimizer
from pipeline.oversight import Oversight
from pipeline.pace import Pace
from pipeline.pretrained import load_pretrained
from pipeline.profiling import StepProfiler
from pipeline.recovery import find_healthy, plan_rollback
from pipeline.rollback import Adjustment, resumed
from pipeline.sample_hash import roll
from pipeline.step import Stepper, StepResult, iterations
from pipeline.timing import StepClock
from pipeline.trace import Trace
from pipeline.update_probe import UpdateProbe
from pipeline.validation import Validation
from pipeline.watchdog import Watchdog

if TYPE_CHECKING:
    from data_prep.world import World
    from pipeline.attempt import Attempt, Start
    from pipeline.config import RunConfig


_CHANGES_LOSS = ("data.", "depth.", "objective.", "train.global_batch_size", "schedule.")
"""Beginnings of the keys whose change at a resume makes other losses likely."""


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
        self._history = start.history
        self._oversight = Oversight(config, world, control, self._event, on_alarm)
        self._attempt = int(place.directory.name)
        self._run_dir = Path(config.run_dir)
        self._profiler = StepProfiler(config.train.profile, place.directory if world.rank == 0 else None, world.rank)
        with watchdog.limit(config.control.hang_start_minutes * 60.0):
            with journal.phase("node check"):
                place.note(node_check=check_nodes(config.node_check, world, device, self._run_dir))
            with journal.phase("build"):
                self._build(fresh=start.found.manifest is None)
            with journal.phase("load"):
                self._restore(start.found)
                if any(key.startswith(_CHANGES_LOSS) for key in start.changes):
                    self._oversight.relearn()
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
        self._stepper.veto = self._oversight.veto if self._oversight.acts else None
        if self._oversight.repeats:
            self._stepper.take_fingerprints()
        self._update_probe, self._pace = UpdateProbe(self._engine, world), Pace(world)
        self._depth_gain = DepthGain(config, self._data, world, self._device)
        self._adjustments: list[Adjustment] = []
        if self._kernels is not None:
            self._stepper.warm_up(self._data.manifests[0].sequence_length)
        self._validation = Validation(config, world, self._device)
        self._accounting = Accounting(config, self._data.manifests[0].sequence_length, world.size, self._device)
        with world.guard("probe batch"):
            self._probe = ProbeBatch(config, self._data, self._device)
        self._health = Health()
        self._validated: dict[str, Any] = {}

    def _restore(self, found: Found) -> None:
        """Load what the run goes on from, if anything, and prove that the model is the one that was saved."""
        saved, settings = found.manifest, self._config.checkpoint
        if saved is None:
            return
        reader = found.open(self._world, self._run_dir, other_owners=settings.other_owners)
        with self._world.guard("checkpoint load"):
            fill(self._engine, reader)
        publish_weights(self._engine)
        saved_adjustments = [Adjustment(**each) for each in saved.adjustments]
        self.progress, self._adjustments = resumed(saved.progress, saved_adjustments, self._history.rollbacks)
        self._agenda.adjust(self._adjustments)
        self._validated, self._health = saved.validation, Health()
        answers = self._probe.ask(self._engine)
        with self._world.guard("proof"):
            pairs = compare(saved.proof, answers, settings.proof_tolerance)
        events = read_events(self._run_dir) if self._log is not None else []
        self._oversight.restore(saved.monitor, events, rolled_back=self.progress.branch > saved.progress.branch)
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
        saver.shorten(*start.history.shortened)
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
            record, result = self._step()
            cause, trained = result.cause, self.progress.tokens > tokens_before
            if not trained:
                self._event("no_targets", step=record["step"], reason="loss masks leave out every token of the batch")
            # Loss scaling looks for the largest scale that does not overflow; without it nothing may.
            overflowed = config.train.precision == "fp16" and step_skipped(self._engine)
            if overflowed:
                self._event("loss_scale", step=record["step"], **loss_scale_state(self._engine))
            elif not result.updated:
                record["skipped"] = True
            finite = math.isfinite(record["grad_norm"]) and (math.isfinite(record["loss"]) or not trained)
            diverges = not (finite or overflowed or (self._oversight.acts and not result.updated))
            stop = cause if cause is not None and cause.flag.stops else None
            self._measure(record, ends=stop is not None or diverges)
            self._conclude(record, on_step, trained=trained, overflowed=overflowed)
            if diverges:
                return self._diverged(record, cause)
            if self.progress.step in config.train.profile.steps[1:]:
                self._end_profile()
            reached = self.progress
            ending = self._heed(cause, stop)
            if ending is not None:
                return ending
            if self.progress is not reached:  # gone back
                continue
            self._save(result.reports)
            if self.progress.step == self._first + 1:
                self._saver.prepare()
                self._keep_kernels()
        raise AssertionError("a run that has no steps left is not started")

    def _heed(self, cause: Cause | None, stop: Cause | None) -> Ending | None:
        """Do what was agreed on with the step; return how the run ended, if it does."""
        decision: Decision | None = None
        finished = self.progress.step == self._config.train.steps
        if stop is not None or finished:  # no agreement will come in which rank 0 could say what it decided just now
            decision = self._oversight.pending()
        elif cause is not None and cause.flag is Flag.VERDICT:
            decision = self._oversight.decided(cause.detail)
        if decision is not None and decision.action == "stop":
            return self._give_up(decision.reason)
        if decision is not None and decision.action == "rollback":
            reached, ending = self.progress, self._roll_back(decision, None if finished else stop)
            if ending is not None or self.progress is not reached:
                return ending
        elif decision is not None:
            assert decision.until is not None
            self._saver.shorten(decision.factor, decision.until)
            self._event("interval", step=self.progress.step, factor=decision.factor, until=decision.until)
        return self._end(stop if not finished else None) if stop is not None or finished else None

    def _step(self) -> tuple[Record, StepResult]:
        """Do one step, again if it must be; return its record and what it came to."""
        config, number, started = self._config, self.progress.step + 1, time.perf_counter()
        upcoming = self._agenda.upcoming(number - 1, self.progress.samples, config.data.prefetch)
        step, probed = upcoming[0], number % config.monitor.probe_every == 0
        expected = self._watchdog.expected(len(step.depths), *iterations(step))
        trace = Trace() if self._log is not None and probed else None
        self._profiler.before(number)
        self._oversight.begin(number, step)
        probe = self._update_probe if probed else None
        result = self._stepper.do(number, upcoming, trace, probe)
        result, trace = self._oversight.look_again(number, result, self._stepper, trace, probe)
        seconds = time.perf_counter() - started
        self.progress = dataclasses.replace(
            self.progress,
            step=number,
            samples=self.progress.samples + step.share.batch_size,
            tokens=self.progress.tokens + result.tokens,
            sample_hash=roll(self.progress.sample_hash, result.sample_sums),
        )
        record: Record = {
            **dataclasses.asdict(self.progress),
            "time": time.time(),
            "loss": result.loss,
            "grad_norm": result.gradient_norm,
            "lr": step.learning_rate,
            **step.depth_record(),
            "seconds": seconds,
            "tokens_per_second": result.tokens / seconds,
            **({} if expected is None else {"expected_seconds": expected}),
            **self._accounting.record(step, seconds),
            **(trace.to_record() if trace is not None else {}),
            **result.measured,
        }
        return record, result

    def _measure(self, record: Record, *, ends: bool) -> None:
        """Add to the record what is measured between steps, if it is due; a run that ends may have no time."""
        number, config = self.progress.step, self._config
        phases = self._accounting.phases(self._clock)
        self._pace.add(*self._stepper.own_iterations(), self._stepper.forward_seconds(phases))
        if number % config.monitor.pace_every == 0:
            with self._watchdog.limit(self._config.control.hang_save_minutes * 60.0):
                record |= self._pace.read()
        if not ends:
            if number % config.monitor.depth_gain_every == 0:
                record |= self._look_at_depth()
            if self._validation.due(number):
                record |= self._validate()
        later = self._accounting.phases(self._clock)
        record["phases"] = {name: phases.get(name, 0.0) + later.get(name, 0.0) for name in (*phases, *later)}

    def _conclude(self, record: Record, on_step: Callable[[Record], None], *, trained: bool, overflowed: bool) -> None:
        """Write the record down and let the monitor see it."""
        self._health.note(record)
        if self._log is not None:
            self._log.step(record)
            on_step(record)
            # The norm of a gradient that overflowed at a loss scale and the loss of no tokens say nothing.
            senseless = {"grad_norm": None} if overflowed else {}
            self._oversight.after_step({**record, **senseless, **({} if trained else {"loss": None})})

    def _look_at_depth(self) -> Record:
        limit = self._watchdog.limit(self._config.control.hang_save_minutes * 60.0)
        with limit, journal.phase("depth gain"), self._clock("validation"):
            found = self._depth_gain.measure(self._engine)
        return {"depth_gain": found} if found else {}

    def _roll_back(self, decision: Decision, stop: Cause | None) -> Ending | None:
        """Go back to a healthy checkpoint, and on from there past the data in between; return how the run ended, if so.

        A run that has to stop only writes down that it goes back, and brings what it goes back to where its next start
        finds it.
        """
        limit = self._watchdog.limit(self._config.control.hang_start_minutes * 60.0)
        with limit, journal.phase("rollback"), self._clock("rollback"):
            self._saver.settle()
            found = find_healthy(self._config, self._world, self._run_id, self._history, decision)
            if found is not None and found.manifest is not None:
                there, length = found.manifest.progress, self._data.mixture.length
                rollback = plan_rollback(self._config, decision, self.progress, there, self._adjustments, length)
                said = {"detector": decision.finding.detector, "reason": decision.reason}
                self._event("rollback", **rollback.to_dict(), **said)  # before it is done: see pipeline.rollback
                if self._log is not None:
                    self._on_alarm(str(rollback))
                if stop is not None:
                    found.open(self._world, self._run_dir, other_owners=self._config.checkpoint.other_owners)
                    self._event("stop", step=self.progress.step, **cause_fields(stop))
                    return Ending(ExitCode.STOPPED, f"{stop}; {rollback} at the next start", cause_fields(stop))
                self._history = dataclasses.replace(self._history, rollbacks=[*self._history.rollbacks, rollback])
                self._restore(found)
                self._saver.go_back_to(self.progress.step, promoted=found.candidate is not None)
                return None
        missing = f"{decision.reason}; there is no healthy checkpoint from before that"
        if decision.vital:
            return self._give_up(missing)
        self._event("no_rollback", step=self.progress.step, reason=missing)
        self._oversight.relearn()
        return None

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
        self._leave()
        ending = diverged(record, cause, self._newest())
        self._event("non_finite", step=record["step"], reason=ending.reason, **ending.fields)
        return ending

    def _give_up(self, reason: str) -> Ending:
        self._leave()
        ending = gave_up(self.progress.step, reason, self._newest())
        self._event("gave_up", step=self.progress.step, reason=ending.reason)
        return ending

    def _leave(self) -> None:
        """Bring what is on its way to its end, of a run that a person must look at."""
        with self._saving():
            self._saver.settle()
            # Nodes hold states so young that what has shown now may have begun before them.
            self._saver.discard_node_tiers()

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
            health=self._health.vector(self._oversight.suspects()),
            monitor=self._oversight.state(),
            adjustments=[dataclasses.asdict(each) for each in self._adjustments],
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
