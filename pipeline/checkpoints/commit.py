"""From files to a checkpoint: everything is on disk before a directory has its final name."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from data_prep.files import sync_path
from pipeline.checkpoints.manifest import MANIFEST, CheckpointManifest, checkpoint_name
from pipeline.checkpoints.shard import Entry, Piece, Snapshot, write_file


def partial_of(parent: Path, step: int) -> Path:
    """Return where a checkpoint is written before it is complete."""
    return parent / f".{checkpoint_name(step)}.partial"


def make_partial(parent: Path, step: int) -> Path:
    """Make the empty directory in which a checkpoint is written."""
    partial = partial_of(parent, step)
    if partial.exists():  # of a save that was killed
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    sync_path(parent.parent)  # or a power cut takes `parent` away, when it is new, with the first checkpoint in it
    return partial


def remove_leftovers(parent: Path) -> None:
    """Remove what saves and removals left that were killed; nobody may be saving into `parent`."""
    for leftover in parent.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a checkpoint, hidden first: a directory under its final name is complete, also when we are killed here."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    shutil.rmtree(path.rename(hidden))


def set_aside(path: Path) -> None:
    """Give a checkpoint that must not be found any more the name superseded-*: a person may want to look at it.

    What has such a name is neither counted nor removed by anything.
    """
    aside, number = path.with_name(f"superseded-{path.name}"), 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"superseded-{path.name}-{number}")
    path.rename(aside)


def commit(partial: Path, content: bytes) -> Path:
    """Add manifest.json with `content` to files that are on disk, and give the directory its final name; return that.

    What has the name already was passed over at the start, as broken or of another user, and is set aside.
    """
    final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    write_file(partial / MANIFEST, memoryview(content))
    sync_path(partial)
    if final.exists():
        set_aside(final)
    partial.rename(final)
    sync_path(final.parent)
    return final


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank adds to a checkpoint.

    Attributes:
        file: the name of its file; None if it holds no piece.
        entry: what the manifest says of the file.
        pieces: what is in it.
        optimizer_state: names of the optimizer's tensors in it.
    """

    file: str | None
    entry: Entry
    pieces: list[Piece]
    optimizer_state: list[str]


def shard_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"shard-{rank:05d}.safetensors"


def complete(draft: CheckpointManifest, parts: Sequence[Part]) -> CheckpointManifest:
    """Return the manifest of a checkpoint of these parts, one a rank, in rank order."""
    fragments: dict[str, list[tuple[str, int, int]]] = {}
    for part in parts:
        for parameter, start, numel in part.pieces:
            assert part.file is not None
            fragments.setdefault(parameter, []).append((part.file, start, numel))
    return dataclasses.replace(
        draft,
        time=time.time(),
        world_size=len(parts),
        optimizer_state=sorted({state for part in parts for state in part.optimizer_state}),
        fragments={name: sorted(pieces, key=lambda piece: piece[1]) for name, pieces in fragments.items()},
        files={part.file: part.entry for part in parts if part.file is not None},
    )


def write_part(partial: Path, rank: int, snapshot: Snapshot) -> Part:
    """Write a rank's file; return what it adds to the checkpoint."""
    if not snapshot.pieces:
        return Part(file=None, entry={}, pieces=[], optimizer_state=[])
    name = shard_name(rank)
    entry = write_file(partial / name, snapshot.memory)
    return Part(file=name, entry=entry, pieces=snapshot.pieces, optimizer_state=snapshot.optimizer_state)
