"""Where a rollback goes: the newest checkpoint from before the trouble, and the data and rate to go on with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoints.health import SUSPECT
from pipeline.checkpoints.restart import Found, History, find_checkpoint
from pipeline.rollback import Adjustment, Rollback, data_to_skip
from pipeline.schedules import samples_before

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data_prep.world import World
    from monitoring.policy import Decision
    from pipeline.checkpoints.manifest import CheckpointManifest, Progress
    from pipeline.config import RunConfig


def find_healthy(config: RunConfig, world: World, run_id: str, history: History, decision: Decision) -> Found | None:
    """Return the newest checkpoint from long enough before the first sign, else from before it; a collective.

    Args:
        config: the resolved configuration.
        world: the ranks.
        run_id: the run's identity.
        history: what it did before, up to now.
        decision: to go back.
    """
    for latest in (decision.before, decision.fallback):
        if latest is None:
            continue

        def objection(manifest: CheckpointManifest, latest: int = latest) -> str | None:
            if manifest.progress.step > latest:
                return f"it may be touched by what {decision.finding.detector} found"
            return "it was suspect when saved" if manifest.health.get("verdict") == SUSPECT else None

        found = find_checkpoint(config.checkpoint, world, Path(config.run_dir), run_id, history, objection)
        if found.manifest is not None:
            return found
    return None


def plan_rollback(
    config: RunConfig,
    decision: Decision,
    now: Progress,
    there: Progress,
    adjustments: Sequence[Adjustment],
    length: int | None,
) -> Rollback:
    """Return what a rollback does.

    Args:
        config: the resolved configuration.
        decision: to go back.
        now: how far the run is.
        there: how far it was when the checkpoint was saved.
        adjustments: of the learning rate that hold now.
        length: samples that the datasets give, None for as many as are asked for.
    """
    # What held beyond the step to go back to holds from there on: it was too much even so.
    lowered = [each.from_step(there.step) for each in adjustments]
    if decision.rate_factor != 1.0 or decision.rewarm_steps:
        lowered.append(Adjustment(there.step, decision.rate_factor, decision.rewarm_steps))
    size, steps = config.train.global_batch_size, config.train.steps
    needed = samples_before(config.schedule, size, steps) - samples_before(config.schedule, size, there.step)
    return Rollback(
        from_step=now.step,
        to_step=there.step,
        branch=now.branch + 1,
        samples_from=there.samples,
        samples_to=data_to_skip(now.samples + decision.skip_steps * size, there.samples, needed=needed, length=length),
        adjustments=lowered,
    )
