"""Broken parts of a dataset made anew from the inputs, byte for byte, and nothing else touched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.config import BuildConfig
from data_prep.dedup import Flags
from data_prep.dispatch import Dispatcher
from data_prep.documents import find_duplicates
from data_prep.errors import DataError
from data_prep.job import PLAN_FILE, TOKENIZER_DIRECTORY, choose_engine_for, sha256_of, tokenizer_files
from data_prep.manifest import Manifest, Part
from data_prep.plan import Plan, Unit
from data_prep.readers import WorkItem
from data_prep.readers.items import unreadable
from data_prep.tokenizer import Tokenizer
from data_prep.units import Recipe, UnitBuilder
from data_prep.verify import broken_parts
from data_prep.workspace import Workspace
from data_prep.world import World


def repair_dataset(directory: Path, world: World, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Rebuild the broken parts of a dataset from its inputs; return their names.

    A collective. A part takes its place only if it is exactly what the manifest says. With deduplication the whole
    corpus is read once, since what a part leaves out depends on all of it.

    Args:
        directory: the dataset; its manifest, plan and tokenizer must be intact.
        world: the ranks that share the work.
        progress: called on rank 0 with the units of work that are done, and all that there are.

    Raises:
        DataError: the dataset cannot be repaired: what describes it is broken, or an input has changed.
    """
    with world.guard("read the manifest"):
        manifest = Manifest.read(directory) if world.rank == 0 else None
    manifest = world.broadcast(manifest)
    assert manifest is not None
    broken = broken_parts(directory, manifest, world)
    if not broken:
        return []
    with world.guard("read the plan"):
        settings, plan = _read_plan(directory, manifest)
        config = BuildConfig.from_settings(settings)
        tokenizer = _tokenizer(directory, manifest, settings)
    flags = _all_flags(plan, config, world) if config.filters.deduplicate != "none" else None
    units = [plan.units[index] for index in sorted({_unit_of(name) for name in broken})]
    engine = choose_engine_for(directory / TOKENIZER_DIRECTORY, units, config, world)
    workspace = Workspace(directory.with_name(f"{directory.name}.repair"))
    with world.guard("prepare"):
        if world.rank == 0:
            workspace.prepare(settings)
            workspace.sweep()
    recipe = Recipe(config, settings["sequence_length"], directory / TOKENIZER_DIRECTORY, tokenizer, engine)
    builder = UnitBuilder(recipe, workspace)
    expected = {part.path: part for part in manifest.parts}

    def repair(unit: Unit) -> None:
        result, _ = builder.encode(unit, None if flags is None else flags[unit.index], lambda size: None).write()
        made = {part.path: part for part in result.parts}
        for name in (name for name in broken if _unit_of(name) == unit.index):
            _replace(directory, workspace, expected[name], made.get(name))

    try:
        with world.guard("repair"):
            _share_out(units, repair, world, progress)
    finally:
        workspace.close()
    with world.guard("clean up"):
        if world.rank == 0:
            workspace.remove()
    return list(broken)


def _share_out(
    units: list[Unit], repair: Callable[[Unit], None], world: World, progress: Callable[[int, int], None] | None
) -> None:
    dispatcher = Dispatcher(world, len(units))

    def report() -> None:
        if progress is not None and world.rank == 0:
            progress(dispatcher.done, len(units))

    done = 0
    try:
        while (position := dispatcher.take()) is not None:
            repair(units[position])
            done += 1
            dispatcher.tick(done)
            report()
    except BaseException:
        dispatcher.abandon()
        raise
    finally:
        dispatcher.close(report)


def _read_plan(directory: Path, manifest: Manifest) -> tuple[dict[str, Any], Plan]:
    path = directory / PLAN_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}), so nothing can be repaired; restore it") from error
    if sha256_of(content) != manifest.provenance.get("plan_sha256"):
        raise DataError(f"{path}: not the plan of this dataset, so nothing can be repaired; restore it")
    record = json.loads(content)
    plan = Plan.from_record(record)
    units = tuple(replace(unit, items=tuple(map(_as_it_is_now, unit.items))) for unit in plan.units)
    return record["settings"], replace(plan, units=units)


def _as_it_is_now(item: WorkItem) -> WorkItem:
    """Take over the file's new modification time: whether its content is the same, the checksums will tell."""
    try:
        now = os.stat(item.path)  # noqa: PTH116 - for a path that is a string
    except OSError as error:
        raise unreadable(item.path, error) from error
    if now.st_size != item.file_bytes:
        raise DataError(
            f"{item.path}: has {now.st_size} bytes and had {item.file_bytes} when the dataset was built; restore it, or"
            " rebuild the dataset with `rookery data build`"
        )
    return replace(item, modified=now.st_mtime_ns)


def _tokenizer(directory: Path, manifest: Manifest, settings: dict[str, Any]) -> Tokenizer:
    where = directory / TOKENIZER_DIRECTORY
    tokenizer = Tokenizer.load(where)
    found = {name: sha256_of(content) for name, content in tokenizer_files(where).items()}
    if tokenizer.sha256 != manifest.tokenizer_sha256 or found != settings["tokenizer"]:
        raise DataError(f"{where}: not the tokenizer of this dataset; restore its files")
    return tokenizer


def _all_flags(plan: Plan, config: BuildConfig, world: World) -> dict[int, Flags]:
    merged: dict[int, Flags] = {}
    for of_rank in world.allgather(find_duplicates(plan, config, world)):
        merged |= of_rank
    return merged


def _unit_of(part: str) -> int:
    return int(part.split("-")[1])


def _replace(directory: Path, workspace: Workspace, expected: Part, made: Part | None) -> None:
    """Put a new part in the place of a broken one, which goes into the workspace and with it."""
    if made != expected:
        raise DataError(
            f"{directory / expected.path}: the inputs no longer give this part, so one of them has changed; restore"
            " them, or rebuild the dataset with `rookery data build`"
        )
    place = directory / expected.path
    with workspace.writing():
        if place.exists():
            place.rename(workspace.root / f"{expected.path}.broken")
        (workspace.data / expected.path).rename(place)
