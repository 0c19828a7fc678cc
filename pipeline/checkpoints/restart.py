"""Which checkpoint a run goes on from: the newest that is intact, over all tiers and with all ranks of one mind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from data_prep.world import World
from monitoring.runlog import attempts, read_events
from pipeline.checkpoints.manifest import (
    MANIFEST,
    WEIGHT,
    CheckpointManifest,
    checkpoint_name,
    decode_manifest,
    list_checkpoints,
    read_manifest_bytes,
)
from pipeline.checkpoints.node_tiers import Candidate, check, promote, survey
from pipeline.checkpoints.reader import CheckpointReader, check_files
from pipeline.engine import allocate_optimizer_state, local_fragments, restore_loss_scale
from pipeline.errors import CheckpointError
from pipeline.rollback import Rollback, left_behind

if TYPE_CHECKING:
    from pipeline.checkpoints.saver import CheckpointConfig


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where a run stands.

    Attributes:
        manifest: of the checkpoint to go on from; None if there is none.
        directory: where it lies on the shared file system, None if only the nodes hold it.
        candidate: what the nodes hold, None if it lies on the shared file system.
        problems: name -> problem of newer checkpoints that are passed over.
        broken: whether there are checkpoints on the shared file system, but none that is intact.
    """

    manifest: CheckpointManifest | None = None
    directory: Path | None = None
    candidate: Candidate | None = None
    problems: dict[str, str] = field(default_factory=dict)
    broken: bool = False

    def open(self, world: World, run_dir: Path, *, other_owners: bool) -> CheckpointReader:
        """Return the checkpoint for reading, brought to the shared file system if only the nodes hold it; a collective.

        Raises:
            CheckpointError: that failed; on every rank.
        """
        directory = self.directory
        if self.candidate is not None:
            directory = promote(world, self.candidate, run_dir)
        assert directory is not None
        assert self.manifest is not None
        return CheckpointReader(directory, manifest=self.manifest, other_owners=other_owners)


@torch.no_grad()
def fill(engine: Any, reader: CheckpointReader) -> None:
    """Read this rank's share of weights and optimizer state, whatever ranks and stage it was saved by.

    `pipeline.engine.publish_weights` has to follow, on all ranks.

    Raises:
        CheckpointError: the checkpoint lacks something.
    """
    saved = reader.manifest
    if saved.optimizer_state:
        allocate_optimizer_state(engine, saved.optimizer_state, saved.progress.step)
    for fragment in local_fragments(engine):
        for kind, tensor in {WEIGHT: fragment.weight, **fragment.optimizer_state}.items():
            reader.read(fragment.parameter, kind, fragment.start, tensor)
    restore_loss_scale(engine, saved.loss_scale)


@dataclass(frozen=True, kw_only=True)
class History:
    """What a run's log says of the launches so far.

    Attributes:
        attempts: number of the newest.
        starts: (attempt, step from which it went on), in order.
        saved: names of the checkpoints that it has completed on the shared file system.
        save_seconds: how long the last of them took, 0.0 if there is none.
        rollbacks: in order.
        shortened: what the interval between checkpoints was last divided by, and up to which step.
    """

    attempts: int = 0
    starts: list[tuple[int, int]] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    save_seconds: float = 0.0
    rollbacks: list[Rollback] = field(default_factory=list)
    shortened: tuple[int, int] = (1, 0)

    @classmethod
    def read(cls, run_dir: Path) -> History:
        """Read it; a run that has not begun has none."""
        if not run_dir.is_dir():
            return cls()
        events = read_events(run_dir)
        saved = [event for event in events if event["kind"] == "checkpoint" and event.get("tier") == "shared"]
        shorter = [event for event in events if event["kind"] == "interval"]
        return cls(
            attempts=max(attempts(run_dir), default=0),
            starts=[(event["attempt"], event["step"]) for event in events if event["kind"] == "start"],
            saved=[event["path"] for event in saved],
            save_seconds=saved[-1]["seconds"] if saved else 0.0,
            rollbacks=[Rollback.from_event(event) for event in events if event["kind"] == "rollback"],
            shortened=(shorter[-1]["factor"], shorter[-1]["until"]) if shorter else (1, 0),
        )

    def left_behind(self, manifest: CheckpointManifest, *, on_nodes: bool) -> str | None:
        """Return why the run does not go on from a checkpoint that it has gone back behind, None if it has not.

        Args:
            manifest: of the checkpoint.
            on_nodes: whether it is one that nodes still hold.
        """
        progress = manifest.progress
        rollback = left_behind(self.rollbacks, progress.branch, progress.step)
        if rollback is not None:
            return f"the run was rolled back from step {rollback.from_step} to {rollback.to_step} since"
        later = (each for each in self.starts if each[0] > manifest.attempt and each[1] < progress.step)
        if on_nodes and (start := next(later, None)) is not None:
            return f"the run has gone on from step {start[1]} since (attempt {start[0]})"
        return None


class _Listed(NamedTuple):
    path: Path
    step: int
    manifest: bytes


def find_checkpoint(
    config: CheckpointConfig,
    world: World,
    run_dir: Path,
    run_id: str,
    history: History,
    objection: Callable[[CheckpointManifest], str | None] = lambda manifest: None,
) -> Found:
    """Find the newest intact checkpoint of a run; a collective with one result.

    The ranks share out the files that are to be read: at an unchanged world size each reads the file that it wrote and
    will load, which then lies in its node's page cache.

    Args:
        config: the tiers, and whether files of other users are taken.
        world: the ranks.
        run_dir: the run.
        run_id: its identity, empty if it has none yet.
        history: what it did before.
        objection: why one is not wanted, given its manifest; the same on all ranks.

    Raises:
        CheckpointError: its checkpoints cannot be looked at; on every rank.
        ConfigError: another user could have planted what lies in a node's memory; on every rank.
    """
    problems: dict[str, str] = {}
    with world.guard("checkpoints"):
        found = _list(run_dir, problems, other_owners=config.other_owners) if world.rank == 0 else []
    listed, problems = world.broadcast((found, problems))
    there = bool(listed or problems)
    candidates: list[Candidate] = []
    if run_id:
        held = survey(world, config.node_tiers, run_id, other_owners=config.other_owners)
        problems |= held.problems
        for candidate in held.candidates:
            manifest = candidate.manifest()
            problem = history.left_behind(manifest, on_nodes=True) or objection(manifest)
            if problem is None:
                candidates.append(candidate)
            else:
                problems[candidate.name] = problem
    by_step: list[Candidate | _Listed] = [*listed, *candidates]  # of the same step, what need not be copied
    for each in sorted(by_step, key=lambda each: each.step, reverse=True):
        if isinstance(each, _Listed):
            manifest = decode_manifest(each.manifest, each.path / MANIFEST)
            problem = (
                history.left_behind(manifest, on_nodes=False)
                or objection(manifest)
                or _check_together(world, each.path, manifest, other_owners=config.other_owners)
            )
            if problem is None:
                return Found(manifest=manifest, directory=each.path, problems=problems)
            problems[each.path.name] = problem
        else:
            checked, bad = check(world, each, other_owners=config.other_owners)
            problems |= bad
            if checked is not None:
                return Found(manifest=checked.manifest(), candidate=checked, problems=problems)
    return Found(problems=problems, broken=there)


def _list(run_dir: Path, problems: dict[str, str], *, other_owners: bool) -> list[_Listed]:
    """Return the checkpoints whose manifests can be used; the others go into `problems`."""
    listed = []
    try:
        paths = list_checkpoints(run_dir)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: cannot be read ({error.strerror}); the run's checkpoints lie there: make it readable"
        ) from None
    for path in paths:
        try:
            content = read_manifest_bytes(path, other_owners=other_owners)
            step = decode_manifest(content, path / MANIFEST).progress.step
            if path.name != checkpoint_name(step):
                raise CheckpointError(f"{path}: holds step {step}")
            listed.append(_Listed(path, step, content))
        except (CheckpointError, OSError) as error:
            problems[path.name] = str(error)
    return listed


def _check_together(world: World, directory: Path, manifest: CheckpointManifest, *, other_owners: bool) -> str | None:
    """Return what is wrong with a checkpoint, of which every rank looks at some files."""
    problem = None
    try:
        check_files(directory, manifest, sorted(manifest.files)[world.rank :: world.size], other_owners=other_owners)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    return next((said for said in world.allgather(problem) if said is not None), None)
