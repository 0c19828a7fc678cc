"""A checkpoint of given pieces on the shared file system, written at once instead of behind a training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.world import World
from pipeline.checkpoints.commit import commit, complete, make_partial, partial_of, write_part
from pipeline.checkpoints.manifest import CheckpointManifest, Progress, checkpoint_name, encode_manifest
from pipeline.checkpoints.shard import Snapshot
from pipeline.engine import Fragment


def draft(step: int, **fields: Any) -> CheckpointManifest:
    """Return a manifest that says nothing but its step and `fields`."""
    nothing: dict[str, Any] = {"config": {}, "data_fingerprint": "", "tokenizer_sha256": "", "shapes": {}}
    return CheckpointManifest(progress=Progress(step=step), **{**nothing, **fields})


def save_checkpoint(run_dir: Path, world: World, fragments: Iterable[Fragment], draft: CheckpointManifest) -> Path:
    """Write a checkpoint from every rank's fragments and wait for it; a collective. Returns its directory.

    Args:
        run_dir: it goes into its folder `checkpoints`.
        world: the ranks.
        fragments: what this rank has to save.
        draft: the manifest, in which what follows from the fragments is still empty.
    """
    parent, held = run_dir / "checkpoints", list(fragments)
    with world.guard("checkpoint directory"):
        partial = make_partial(parent, draft.progress.step) if world.rank == 0 else None
    with world.guard("checkpoint write"):
        snapshot = Snapshot(held)
        snapshot.take(held)
        part = write_part(partial_of(parent, draft.progress.step), world.rank, snapshot)
    parts = world.gather(part)
    with world.guard("checkpoint commit"):
        if partial is not None and parts is not None:
            commit(partial, encode_manifest(complete(draft, parts)))
    return parent / checkpoint_name(draft.progress.step)
