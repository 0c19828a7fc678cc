"""One launch of a run: what is checked before anything is written, and what is written about the launch itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_prep.files import published_directory
from data_prep.manifest import Manifest
from data_prep.tokenizer import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE, Tokenizer
from data_prep.world import PeerError, World
from kernels.attention import backend_problem
from monitoring.alerting.alerts import AlertSender
from monitoring.crashes.report import report_crashes, write_crash_report
from monitoring.runlog import RunLog, read_outcome, write_atomic
from monitoring.sinks.feed import Sinks, check_sinks
from pipeline.accelerator import describe
from pipeline.agenda import schedule_digest
from pipeline.checkpoints.manifest import CheckpointManifest, Progress
from pipeline.checkpoints.restart import Found, History, find_checkpoint
from pipeline.compilation import compiler_problem
from pipeline.engine import check_ranks
from pipeline.errors import CheckpointError, ConfigError, ExitCode, RunError, UnhealthyNodeError
from pipeline.journal import journal
from pipeline.loader import TrainingData, open_training_data
from pipeline.model import build_meta_model
from pipeline.optim import check_optimizer
from pipeline.pretrained import check_init_from
from pipeline.rollback import resumed

if TYPE_CHECKING:
    from pipeline.config import RunConfig


ENVIRONMENT = "environment.json"
CONFIG = "run.yaml"
RUN_ID = "id"

# Beside the model: another optimizer has another state.
_HELD = ("seed", "optimizer.kind", "optimizer.muon.tensors")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where an attempt begins.

    Attributes:
        data: the training data and the order of its samples.
        found: the checkpoint to resume from, if any.
        history: what the run did before.
        changes: dotted path -> [then, now] of what changed in the configuration since that checkpoint.
        digest: hash of the steps to come, equal on all ranks.
    """

    data: TrainingData
    found: Found
    history: History
    changes: dict[str, list[Any]]
    digest: str

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        if self.found.manifest is None:
            return Progress()
        return resumed(self.found.manifest.progress, [], self.history.rollbacks)[0]


def prepare(config: RunConfig, world: World) -> Start:
    """Check everything that can be wrong with the input; a collective that writes nothing.

    Raises:
        ConfigError, DataError, CheckpointError: bad input, on every rank.
    """
    with world.guard("configuration"):
        config.train.check_world_size(world.size, config.schedule)
        if problem := backend_problem(config.train.attention):
            raise ConfigError(f"train.attention: {problem}")
        if config.train.compile.enabled and (problem := compiler_problem()):
            raise ConfigError(f"train.compile.enabled: {problem}")
        config.checkpoint.check_directories()
        if world.rank == 0:
            check_sinks(config.monitor.sinks)
        check_optimizer(config.optimizer, build_meta_model(config.model))
        # One rank reads the manifests; thousands that look at every shard bring a file system down.
        own = _look(config) if world.rank == 0 else None
    with world.guard("nodes"):
        check_ranks(config.zero, config.comm, world)
    looked = world.broadcast(own)
    assert looked is not None
    data, run_id, history = looked
    with world.guard("dataset"):
        data.check_shards(world.rank, world.size)
    found = find_checkpoint(config.checkpoint, world, Path(config.run_dir), run_id, history)
    with world.guard("checkpoint"):
        if found.broken:
            raise CheckpointError(
                f"{config.run_dir}: none of its checkpoints is intact ({'; '.join(found.problems.values())});"
                " restore one, or choose another run_dir to start anew"
            )
        if found.manifest is None and history.saved:
            raise CheckpointError(
                f"{config.run_dir}: has saved {history.saved[-1]}, but there is no checkpoint any more; restore"
                f" {Path(config.run_dir) / 'checkpoints'}, or choose another run_dir to start anew"
            )
        changes = {} if found.manifest is None else check_resumable(found.manifest, config, data)
        if found.manifest is None and config.init_from.path is not None and world.rank == 0:
            check_init_from(config)
    start = Start(data=data, found=found, history=history, changes=changes, digest="")
    digest = schedule_digest(config, start.progress.step)
    _compare_digests(digest, world)
    return dataclasses.replace(start, digest=digest)


def _compare_digests(digest: str, world: World) -> None:
    digests = world.allgather(digest)
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    with world.guard("schedule"):
        if others:
            raise ConfigError(
                f"depth: {len(others)} of {world.size} ranks, the first of them {others[0]}, would take other steps"
                " than rank 0; give every rank the same configuration and the same versions of everything"
            )


def _look(config: RunConfig) -> tuple[TrainingData, str, History]:
    """Return the training data, the run's identity (empty if it has none yet), and what it did before."""
    run_dir = Path(config.run_dir)
    data = check_input(config)
    return data, _identity(run_dir), History.read(run_dir)


def check_input(config: RunConfig) -> TrainingData:
    """Return the training data; what one process can find wrong with datasets and run directory.

    Raises:
        ConfigError, DataError: they cannot be used.
    """
    run_dir = Path(config.run_dir)
    data = open_training_data(config)
    if config.validation.every is not None:
        Manifest.load(Path(config.data.validation))  # which looks for its shards
    known = (run_dir / "attempts").is_dir() or (run_dir / CONFIG).is_file()  # which is written before a job starts
    if run_dir.exists() and not known and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ConfigError(f"run_dir: {run_dir} holds something that is not a run; name a new or empty directory")
    kept = run_dir / "tokenizer"
    if kept.exists() and Tokenizer.load(kept).sha256 != data.tokenizer_sha256:
        raise ConfigError(f"data.tokenizer: the run in {run_dir} has another tokenizer; choose another run_dir")
    return data


def _identity(run_dir: Path) -> str:
    """Return what a run is called where nodes keep checkpoints: another name for a copy of its directory."""
    path = run_dir / RUN_ID
    if not path.exists():
        return ""
    run_id = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[0-9a-f]{16}", run_id):
        raise ConfigError(f"run_dir: {path} is not what a run wrote there; restore it or remove it")
    return hashlib.sha256(f"{run_id} {run_dir.resolve()}".encode()).hexdigest()[: len(run_id)]


def check_resumable(saved: CheckpointManifest, config: RunConfig, data: TrainingData) -> dict[str, list[Any]]:
    """Return what changed in the configuration since the checkpoint: dotted path -> [then, now].

    Raises:
        CheckpointError: the model, the seed, the kind of optimizer, the tokenizer or the training data so far changed.
    """
    if saved.progress.step > saved.loss_scale.get("skipped_steps", 0.0) and not saved.optimizer_state:
        raise CheckpointError(
            f"{config.run_dir}: the checkpoint of step {saved.progress.step} has no optimizer state (an average, or"
            " converted without it): it can be evaluated and exported; to train on from it, export it and name it as"
            " init_from.path"
        )
    changes = _differences(saved.config, dataclasses.asdict(config))
    for key, (then, now) in changes.items():
        if key in _HELD or key.startswith("model."):
            raise CheckpointError(
                f"{key}: the checkpoints of {config.run_dir} have {then!r}, the configuration {now!r};"
                " set it back or choose another run_dir"
            )
    for what, before, after in (
        ("tokenizer", saved.tokenizer_sha256, data.tokenizer_sha256),
        ("training data", saved.data_fingerprint, data.mixture.fingerprint(saved.progress.samples)),
    ):
        if before != after:
            raise CheckpointError(
                f"data.train: the {what} of {', '.join(map(str, data.directories))} is not the one that"
                f" {config.run_dir} was trained on so far ({before[:12]} then, {after[:12]} now); name the old"
                " datasets, weights and limits, or choose another run_dir"
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


@dataclass(frozen=True)
class Attempt:
    """A launch that has begun to write.

    Attributes:
        directory: `attempts/NNNN`.
        log: the run log on rank 0, None elsewhere.
        run_id: the run's identity, which its node-private checkpoints lie under.
    """

    directory: Path
    log: RunLog | None
    run_id: str

    def note(self, **facts: Any) -> None:
        """Add what was found out about the machine to environment.json, on rank 0."""
        if self.log is not None:
            path = self.directory / ENVIRONMENT
            write_atomic(path, json.dumps(json.loads(path.read_bytes()) | facts, indent=1).encode())


@contextmanager
def attempt(
    config: RunConfig, world: World, device: torch.device, start: Start, on_alarm: Callable[[str], None]
) -> Iterator[Attempt]:
    """Yield a new attempt; write down how the block failed, if it does.

    Where the log cannot be written, its records wait in memory, `on_alarm` is told, and the block goes on.

    The rank that fails writes `attempts/NNNN/failure-RANK.json`, and outcome.json too unless all ranks know: rank 0
    may be waiting for it, and is ended with it.

    Raises:
        RunError: the block raised a `ValueError`; what was bad input before the start is a failure of the run now.
    """
    with world.guard("run directory"):
        log = _open_log(config, on_alarm) if world.rank == 0 else None
        own = None if log is None else (log.attempt_dir, _identity(log.run_dir))
        if log is not None and log.attempt != start.history.attempts + 1:
            reason = "another job has ended on this run since this one looked at its checkpoints; start it again"
            write_outcome(log.attempt_dir, ExitCode.BAD_INPUT, reason)
            log.close()
            raise ConfigError(f"{config.run_dir}: {reason}")
    known = world.broadcast(own)
    assert known is not None
    directory, run_id = known
    _record_environment(log, world, device)
    with _logging(config, log, on_alarm):
        yield from _begun(config, world, Attempt(directory, log, run_id), start)


def _begun(config: RunConfig, world: World, place: Attempt, start: Start) -> Iterator[Attempt]:
    """Yield an attempt that has its directory; write down how it failed, if it does."""
    log = place.log
    if log is not None:
        report_crashes(log.run_dir, log.attempt)
        found = start.found
        tiers = ["shared"] if found.candidate is None else found.candidate.tiers
        log.event(
            "start",
            step=start.progress.step,
            tiers=[] if found.manifest is None else tiers,
            changed=start.changes,
            passed_over=found.problems,
            schedule=start.digest,
        )
    try:
        yield place
    except Exception as error:
        with suppress(OSError):  # a full disk must not hide what happened
            _report_failure(place.directory, world, error)
        if isinstance(error, ValueError):
            raise RunError(f"{config.run_dir}: {error}") from error
        raise


@contextmanager
def _logging(config: RunConfig, log: RunLog | None, on_alarm: Callable[[str], None]) -> Iterator[None]:
    """Let sinks and alerts follow the run log within the block, on rank 0, and close all of them."""
    if log is None:
        yield
        return
    name, settings = config.name, dataclasses.asdict(config)
    sinks = Sinks.open(
        config.monitor.sinks, log.run_dir, name=name, attempt=log.attempt, settings=settings, on_event=log.event
    )
    alerts = AlertSender(config.monitor.alerts, log.run_dir, name=name, attempt=log.attempt, on_event=log.event)
    log.listeners += [sinks, alerts]
    try:
        yield
    finally:
        outcome = read_outcome(log.run_dir, log.attempt)
        if outcome is not None:
            alerts.ended(outcome["exit_code"], outcome["reason"])
        alerts.close()
        sinks.close()
        log.close()
        if log.waiting:
            on_alarm(f"{log.waiting} records of the run log are lost: {log.problem}")


def record_unhealthy_start(config: RunConfig, world: World, error: UnhealthyNodeError) -> None:
    """Write the outcome of a launch that ended before its attempt could begin; rank 0 speaks for all."""
    if world.rank == 0:
        with suppress(OSError):  # a full disk must not hide what happened
            log = _open_log(config, lambda problem: None)
            write_outcome(log.attempt_dir, ExitCode.UNHEALTHY_NODE, error.reason, hosts=error.hosts)
            write_crash_report(log.run_dir, log.attempt)
            log.close()


def write_outcome(directory: Path, exit_code: int, reason: str, **fields: Any) -> None:
    """Write how the attempt in `directory` ended, on whichever rank knows; the first to know is right.

    When one rank fails, others fail because of it.
    """
    path = directory / "outcome.json"
    if not path.exists():
        record = {"exit_code": exit_code, "reason": reason, "time": time.time(), "attempt": int(directory.name)}
        write_atomic(path, json.dumps(record | fields).encode())


def _report_failure(directory: Path, world: World, error: Exception) -> None:
    host = socket.gethostname()
    if isinstance(error, UnhealthyNodeError):
        if error.speaks(world.rank):
            write_outcome(directory, ExitCode.UNHEALTHY_NODE, error.reason, hosts=error.hosts)
        return
    reason, place = f"{type(error).__name__}: {error}", {}
    if not isinstance(error, PeerError):
        place = {"rank": world.rank, "host": host, "phase": journal.failed_in, "step": journal.standing().step}
        report = place | {"error": traceback.format_exception(error)}
        write_atomic(directory / f"failure-{world.rank:05d}.json", json.dumps(report, indent=1).encode())
        where = f"{place['phase']} of step {place['step']}" if place["step"] else place["phase"]
        reason = f"rank {world.rank} on {host}, {where}: {reason}"
    if world.rank == 0 or not world.failed_together:
        write_outcome(directory, 1, reason, **place)
        write_crash_report(directory.parent.parent, int(directory.name))


def _open_log(config: RunConfig, on_alarm: Callable[[str], None]) -> RunLog:
    from pipeline.config import to_yaml

    run_dir, tokenizer = Path(config.run_dir), Path(config.data.tokenizer)
    log = RunLog.open(run_dir, lambda problem: on_alarm(f"the run log waits in memory: {problem}"))
    if not (run_dir / RUN_ID).exists():
        write_atomic(run_dir / RUN_ID, f"{secrets.token_hex(8)}\n".encode())
    resolved = to_yaml(config).encode()
    write_atomic(run_dir / CONFIG, resolved)
    write_atomic(log.attempt_dir / CONFIG, resolved)
    if not (run_dir / "tokenizer").exists():
        with published_directory(run_dir / "tokenizer") as partial:
            for name in (TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE):
                if (tokenizer / name).is_file():
                    shutil.copyfile(tokenizer / name, partial / name)
    return log


def _record_environment(log: RunLog | None, world: World, device: torch.device) -> None:
    """Write which process on which host is which rank, and in which versions, into the attempt's directory."""
    ranks = world.gather({"host": socket.gethostname(), "pid": os.getpid(), **describe(device)})
    if log is None:
        return
    packages = {name: version(name) for name in ("torch", "deepspeed", "mpi4py", "zarr", "numpy")}
    environment = {"command": sys.argv, "python": sys.version.split()[0], "packages": packages, "ranks": ranks}
    write_atomic(log.attempt_dir / ENVIRONMENT, json.dumps(environment, indent=1).encode())
