"""Saving behind the training: a copy in memory, a file in the fastest tier, and from there on to the slower ones."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.world import World
from pipeline.checkpoints.commit import Part, remove_directory, remove_leftovers, set_aside, shard_name, write_part
from pipeline.checkpoints.manifest import CheckpointManifest, checkpoint_name, checkpoints_in
from pipeline.checkpoints.node_directory import (
    NodeTier,
    NodeTierConfig,
    discard_abandoned,
    discard_all,
    discard_newer,
    find_place,
)
from pipeline.checkpoints.partner import Partner
from pipeline.checkpoints.retention import Known, check_rules, prune
from pipeline.checkpoints.shard import Snapshot, copy_file, write_file
from pipeline.checkpoints.transfer import Outcome, Tier, Transfer
from pipeline.engine import Fragment
from pipeline.errors import ConfigError
from pipeline.launch import node_name

MEMORY, LOCAL, SHARED = "memory", "local", "shared"


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save, where to, and what to keep."""

    every: int = 100
    """Steps between checkpoints on the shared file system; one more is written at the end of the run."""
    keep_last: int = 3
    """Number of newest checkpoints that are kept."""
    keep_every: int | None = None
    """Keep those of every so manieth step for ever; null for none."""
    keep_best: int = 1
    """Number of checkpoints with the lowest validation loss that are kept."""
    keep_healthy: int = 2
    """Number of checkpoints with a healthy verdict, older than `healthy_horizon`, that are kept."""
    healthy_horizon: int = 200
    """Steps until a failure that has begun shows."""
    proof_tolerance: float | None = None
    """Relative difference of the probe batch's loss that is allowed at load; null: 1e-3, with 16 bits 1e-2."""
    other_owners: bool = False
    """Resume from files that belong to another user, too."""
    memory: NodeTierConfig = field(default_factory=lambda: NodeTierConfig(directory="/dev/shm", replicate=True))  # noqa: S108
    """Checkpoints in the memory of each node, and in that of the next one."""
    local: NodeTierConfig = field(default_factory=NodeTierConfig)
    """Checkpoints on a disk in each node."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.every < 1:
            raise ConfigError(f"checkpoint.every: {self.every} is not positive")
        if self.proof_tolerance is not None and self.proof_tolerance < 0.0:
            raise ConfigError(f"checkpoint.proof_tolerance: {self.proof_tolerance} is negative")
        check_rules(self)
        for name, tier in self.node_tiers.items():
            tier.check(name)

    @property
    def node_tiers(self) -> dict[str, NodeTierConfig]:
        """The tiers that are private to a node, the fastest first."""
        return {MEMORY: self.memory, LOCAL: self.local}

    def check_directories(self) -> None:
        """Refuse tiers for which this node has no place.

        Raises:
            ConfigError: with the tier and what to do.
        """
        for name, tier in self.node_tiers.items():
            if tier.every is not None and not os.access(str(tier.directory), os.W_OK | os.X_OK):
                raise ConfigError(
                    f"checkpoint.{name}.directory: {tier.directory} is no directory on {node_name()} that you may"
                    f" write to; name another, or set checkpoint.{name}.every=null"
                )


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """A checkpoint on its way from one tier to another."""

    source: Path
    target: Tier
    draft: CheckpointManifest
    part: Part


class Saver:
    """Saves a run's checkpoints; every method but `reports`, `prepare` and `close` is a collective.

    A save costs the training one copy into host memory. A thread writes that into the fastest tier that is due; from
    there it is copied into the slower ones. A save that is due while one is running is done at the first step after it.

    Args:
        config: when, where to, and what to keep.
        world: the ranks.
        run_dir: the run.
        run_id: its identity.
        fragments: what this rank has to save.
        event: writes an event into the run's log.

    Attributes:
        seconds: how long the last checkpoint on the shared file system took, from the copy to its final name.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        world: World,
        run_dir: Path,
        run_id: str,
        fragments: Callable[[], Iterable[Fragment]],
        event: Callable[..., None],
    ) -> None:
        self._config, self._world, self._fragments, self._event = config, world, fragments, event
        self._run_dir, self._run_id = run_dir, run_id
        self._known: Known = {}
        self._not_removed: list[str] = []
        self._snapshots = Transfer(world, self._tidy, self._receive)
        self._copies = Transfer(world, self._tidy)
        self._waiting: list[_Copy] = []
        self._copying: _Copy | None = None
        self._due: list[Tier] = []  # and could not be begun yet
        self._slower: list[Tier] = []
        self._failing: Tier | None = None
        self._snapshot: Snapshot | None = None
        self._blocked = 0.0
        self._failure: str | None = None
        self._factor, self._short_until = 1, 0
        self.seconds = 0.0
        self._shared = Tier(
            name=SHARED,
            directory=run_dir / "checkpoints",
            every=config.every,
            private=False,
            commits=world.rank == 0,
        )
        self._open_tiers()

    def _open_tiers(self) -> None:
        self._homes: list[NodeTier] = []
        self._tiers: list[Tier] = []
        self._partner: Partner | None = None
        self._receiving: Tier | None = None
        if self._shared.commits:
            remove_leftovers(self._shared.directory)
        wanted = {name: tier for name, tier in self._config.node_tiers.items() if tier.every is not None}
        if wanted:
            place = find_place(self._world)
            if any(tier.replicate for tier in wanted.values()):
                self._partner, missing = Partner.build(self._world, place)
                if self._partner is None:
                    self._event("checkpoint_not_replicated", reason=missing)
            with self._world.guard("node's checkpoint directories"):
                for name, tier in wanted.items():
                    assert tier.directory is not None
                    assert tier.every is not None
                    home = NodeTier(Path(tier.directory), self._run_id, place.name)
                    self._homes.append(home)
                    self._tiers.append(
                        Tier(name=name, directory=home.path, every=tier.every, private=True, commits=place.place == 0)
                    )
                    if place.place == 0:
                        discard_abandoned(Path(tier.directory), self._run_id)
        self._tiers.append(self._shared)

    def close(self) -> None:
        """Let go of the nodes' directories."""
        for home in self._homes:
            home.close()

    @property
    def under_way(self) -> int:
        """Number of writes and copies that the last save would have to wait for."""
        return self._snapshots.busy + self._copies.busy + len(self._waiting)

    def prepare(self) -> None:
        """Take the memory of the copies, once the optimizer has a state."""
        if self._snapshot is None:
            self._snapshot = Snapshot(self._fragments())

    def due(self, step: int) -> list[Tier]:
        """Return the tiers into which the state after `step` goes, the fastest first."""
        factor = self._factor if step <= self._short_until else 1
        return [tier for tier in self._tiers if step % max(1, tier.every // factor) == 0]

    def wanted(self, step: int) -> bool:
        """Say whether there is anything to do after `step`: to go on with, to do again, or due."""
        return bool(self.under_way or self._due or self.due(step))

    def save(self, step: int, draft: Callable[[], CheckpointManifest]) -> None:
        """Begin to save the state after `step` if a tier is due, or could not be served before.

        Args:
            step: number of completed steps.
            draft: makes the manifest, in which what follows from the files is still empty.
        """
        for tier in self.due(step):
            if tier in self._due and tier.name != MEMORY:
                self._event("checkpoint_skipped", step=step, tier=tier.name, reason="the one before is not even begun")
        due = self._due = [tier for tier in self._tiers if tier in self._due or tier in self.due(step)]
        if len(due) > 1 and due[0] is self._failing:  # the others must not wait for it
            due = due[1:]
        copies = [copy for copy in (self._copying, *self._waiting) if copy is not None]
        if due and not self._snapshots.busy and all(copy.target is not due[0] for copy in copies):
            self._due = []
            self._begin(due, draft)

    def save_last(self, draft: Callable[[], CheckpointManifest]) -> str | None:
        """Save on the shared file system and wait for it; return why that failed, None if it did not."""
        self.settle()
        self._failure, self._due = None, []
        self._begin([self._shared], draft)
        self.settle()
        return self._failure

    def settle(self) -> None:
        """Wait until nothing is on its way to any tier."""
        while self.under_way:
            self._go_on(self._snapshots.wait(), self._copies.wait())

    def go_on_from(self, step: int, *, promoted: bool) -> None:
        """Remove what the nodes hold from beyond the step that the run goes on from.

        Args:
            step: that step.
            promoted: whether its checkpoint was copied from the nodes to the shared file system just now.
        """
        discard_newer(self._world, self._config.node_tiers, self._run_id, step)
        if promoted and self._shared.commits:  # crashes between saves would fill the disk with such
            self._tidy(self._shared, step)

    def go_back_to(self, step: int, *, promoted: bool) -> None:
        """Put away what all tiers hold from beyond a step that the run was rolled back to; nothing may be on its way.

        Args:
            step: that step.
            promoted: as for `go_on_from`.
        """
        self._due, self._failing = [], None
        with self._world.guard("checkpoints from before the rollback"):
            if self._shared.commits:
                for path in checkpoints_in(self._shared.directory):
                    if int(path.name.removeprefix("step-")) > step:
                        set_aside(path)
        self.go_on_from(step, promoted=promoted)

    def shorten(self, factor: int, until: int) -> None:
        """Save `factor` times as often up to the step `until`."""
        self._factor, self._short_until = factor, until

    def discard_node_tiers(self) -> None:
        """Give the nodes' memory and disks back; nothing may be on its way."""
        discard_all(self._world, self._config.node_tiers, self._run_id)

    def reports(self) -> list[float]:
        """Return what this rank says in the agreement of a step (4 numbers)."""
        return [*self._snapshots.report(), *self._copies.report()]

    def advance(self, sums: list[float]) -> None:
        """Go on with what is on its way, given the sums of all ranks' reports."""
        self._go_on(self._snapshots.advance(*sums[:2]), self._copies.advance(*sums[2:]))

    def _go_on(self, written: Outcome | None, copied: Outcome | None) -> None:
        if copied is not None:
            self._copying = None
            self._ended(copied, blocked=0.0)
        if written is not None:
            self._written(written)
        if self._waiting and not self._copies.busy:
            self._next_copy()

    def _begin(self, due: list[Tier], make_draft: Callable[[], CheckpointManifest]) -> None:
        started = time.perf_counter()
        draft = self._draft = make_draft()
        self._slower = due[1:]
        outcome = self._snapshots.open(due[0], draft, _refusal(draft))
        if outcome is not None:
            self._written(outcome)
            return
        with self._world.guard("copy of the state"):
            snapshot = self._taken()
        partial, rank = self._snapshots.partial, self._world.rank
        self._snapshots.add(lambda: write_part(partial, rank, snapshot))
        if self._replicates(due[0]):
            assert self._partner is not None
            self._snapshots.expected += 1
            self._receiving = due[0]
            self._partner.start(snapshot.memory if snapshot.pieces else snapshot.memory[:0])
        self._blocked = time.perf_counter() - started

    def _written(self, outcome: Outcome) -> None:
        self._ended(outcome, self._blocked)
        if outcome.problem is None:
            self._failing = None
            self._queue_copies(outcome)
        else:  # a tier that is full, say, must not keep the slower ones from being served
            self._failing = outcome.tier
            self._due = [tier for tier in self._tiers if tier in self._due or tier in self._slower]

    def _taken(self) -> Snapshot:
        self.prepare()
        snapshot = self._snapshot
        assert snapshot is not None
        if not snapshot.fits(self._fragments()):  # the optimizer's state has come since
            snapshot = self._snapshot = Snapshot(self._fragments())
        snapshot.take(self._fragments())
        return snapshot

    def _replicates(self, tier: Tier) -> bool:
        config = self._config.node_tiers.get(tier.name)
        return self._partner is not None and config is not None and config.replicate

    def _receive(self) -> None:
        """Write what has come from the partner node."""
        if self._receiving is None or self._partner is None:
            return
        content = self._partner.poll()
        if content is None:
            return
        self._receiving = None
        path, received = self._snapshots.partial / shard_name(self._partner.source), content

        def write() -> None:
            if len(received):
                write_file(path, received)

        self._snapshots.add(write)

    def _ended(self, outcome: Outcome, blocked: float) -> None:
        tier, step = outcome.tier, outcome.step
        if outcome.problem is not None:
            self._failure = outcome.problem
            self._event("checkpoint_failed", step=step, tier=tier.name, rank=outcome.rank, reason=outcome.problem)
            return
        self._failure = None
        while self._not_removed:
            self._event("checkpoint_not_removed", step=step, tier=tier.name, reason=self._not_removed.pop())
        if tier is self._shared:
            self.seconds = outcome.seconds + blocked
        if tier.name != MEMORY:
            self._event(
                "checkpoint",
                step=step,
                tier=tier.name,
                path=checkpoint_name(step),
                removed=list(outcome.removed),
                seconds=outcome.seconds + blocked,
                blocked=blocked,
            )

    def _queue_copies(self, outcome: Outcome) -> None:
        """Let the slower tiers that are due have a checkpoint that the fastest has."""
        part = self._snapshots.part
        for tier in self._slower:
            held = [copy for copy in self._waiting if copy.target is tier]
            self._waiting = [copy for copy in self._waiting if copy not in held]
            for copy in held:  # it has not begun, and a newer one is there
                step = copy.draft.progress.step
                self._event("checkpoint_skipped", step=step, tier=tier.name, reason="the one before is being copied")
            source = outcome.tier.directory / checkpoint_name(outcome.step)
            draft = outcome.manifest or self._draft
            self._waiting = [*self._waiting, _Copy(source=source, target=tier, draft=draft, part=part)]

    def _next_copy(self) -> None:
        copy = self._copying = self._waiting[0]  # in this order: `_tidy` looks at both from another thread
        self._waiting = self._waiting[1:]
        outcome = self._copies.open(copy.target, copy.draft)
        if outcome is not None:
            self._copying = None
            self._ended(outcome, blocked=0.0)
            return
        partial = self._copies.partial

        def work() -> Part:
            file = copy.part.file
            if file is not None and copy_file(copy.source / file, partial / file) != copy.part.entry:
                raise OSError(f"{copy.source / file}: is not what was written there")
            return copy.part

        self._copies.add(work)

    def _tidy(self, tier: Tier, step: int) -> list[str]:
        """Remove what a tier does not keep, after the checkpoint of `step` was added to it; return the names."""
        try:
            return self._remove_what_is_not_kept(tier, tier.directory / checkpoint_name(step))
        except Exception as error:  # the checkpoint itself is there, whatever is wrong with older ones
            self._not_removed.append(str(error) or repr(error))
            return []

    def _remove_what_is_not_kept(self, tier: Tier, newest: Path) -> list[str]:
        if tier is self._shared:
            return prune(tier.directory, newest.name, self._config, self._known, other_owners=self._config.other_owners)
        waiting = [*self._waiting]
        needed = {copy.source for copy in (*waiting, self._copying) if copy is not None} | {newest}
        older = [path for path in checkpoints_in(tier.directory) if path not in needed]
        removed = older[: max(0, len(older) + 1 - self._config.node_tiers[tier.name].keep)]
        for path in removed:
            remove_directory(path)
        return [path.name for path in removed]


def _refusal(draft: CheckpointManifest) -> Exception | None:
    """Return why a state is not worth a place beside those that a run could go on from."""
    losses = draft.proof.get("losses", {})
    if all(math.isfinite(loss) for loss in losses.values()):
        return None
    return ValueError(f"the model's losses on the probe batch are {', '.join(map(str, losses.values()))}")
