"""What lies in a run's checkpoints, whether it is intact, and removing what is not kept, for a person who asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from monitoring.runlog import hold
from pipeline.checkpoints.commit import remove_directory, remove_leftovers
from pipeline.checkpoints.manifest import (
    MANIFEST,
    CheckpointManifest,
    checkpoint_name,
    read_manifest,
)
from pipeline.checkpoints.reader import check_files, newest_valid, saved_in
from pipeline.checkpoints.retention import facts_of, keep, read_facts
from pipeline.checkpoints.saver import CheckpointConfig
from pipeline.config import load_config
from pipeline.errors import CheckpointError, ConfigError

_Manifests = dict[Path, CheckpointManifest | CheckpointError]
"""Directory -> what its manifest says, or why it cannot be used."""


def describe_checkpoints(path: Path, *, other_owners: bool = False) -> list[dict[str, Any]]:
    """Return what the manifests say, oldest first.

    Args:
        path: a run, or a single checkpoint.
        other_owners: read files that belong to another user.

    Returns:
        Of each: name and problem (None if the manifest can be used), and then step, samples, tokens, sample_hash,
        bytes, files, ranks (that wrote it), optimizer_state, time (unix seconds), verdict, validation_loss (nats a
        token, at the largest depth; None without one), and kept: by which of the run's rules ("last", "every", "best",
        "healthy"), None without readable rules.

    Raises:
        CheckpointError: there is no such run, or it has no checkpoint.
    """
    return list(_describe(path, _manifests(path, other_owners)).values())


def verify_checkpoints(
    path: Path, *, other_owners: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[dict[str, Any]]:
    """Compare every file with its recorded size and checksum.

    Args:
        path: a run, or a single checkpoint.
        other_owners: read files that belong to another user.
        progress: called with (bytes done, bytes in all) before the first file and after each.

    Returns:
        As `describe_checkpoints`; if the manifest can be used also bad_files: the names of the files that are missing,
        changed or of another owner.

    Raises:
        CheckpointError: there is no such run, or it has no checkpoint.
    """
    manifests = _manifests(path, other_owners)
    entries = _describe(path, manifests)
    done, total = 0, sum(_bytes(found) for found in manifests.values())
    progress(done, total)
    for directory, found in manifests.items():
        if isinstance(found, CheckpointError):
            continue
        entry, problems, bad = entries[directory.name], [], []
        for name, expected in found.files.items():
            try:
                check_files(directory, found, [name], other_owners=other_owners)
            except CheckpointError as error:
                problems.append(str(error))
                bad.append(name)
            done += expected["bytes"]
            progress(done, total)
        entry["bad_files"] = bad
        if problems and not directory.is_dir():
            del entries[directory.name]  # removed meanwhile, by a job that is at work on the run
        elif problems:
            entry["problem"] = "; ".join(filter(None, [entry["problem"], *problems]))
    return list(entries.values())


def prune_run(
    run_dir: Path, changes: dict[str, Any], *, dry_run: bool = False, other_owners: bool = False
) -> dict[str, Any]:
    """Remove the checkpoints that the run's rules do not keep; never the newest intact one, nor one that is broken.

    Args:
        run_dir: the run, on which no job may be at work.
        changes: fields of the retention's rules that are to have other values.
        dry_run: remove nothing; a job may be at work.
        other_owners: count and remove those of other users as well, as the run itself may be set to.

    Returns:
        removed (names), bytes (of those), kept (name -> by which rules), broken (name -> problem), dry_run.

    Raises:
        ConfigError: a value without a meaning, or the run's configuration cannot be read.
        CheckpointError: there is no such run, none of its checkpoints is intact, or something cannot be removed.
        RunLogError: a job is at work on the run.
    """
    if not (run_dir / "run.yaml").is_file():
        raise CheckpointError(
            f"{run_dir}: not a run, which has a run.yaml; name a directory that `rookery train` wrote"
        )
    config = load_config(str(run_dir / "run.yaml")).checkpoint
    try:
        rules = dataclasses.replace(config, other_owners=config.other_owners or other_owners, **changes)
    except ConfigError as error:
        option = next(name for name in changes if f"checkpoint.{name}:" in str(error))
        raise ConfigError(f"--{option.replace('_', '-')} {changes[option]}: {error}") from None
    try:
        with nullcontext() if dry_run else hold(run_dir):
            return _prune(run_dir, rules, dry_run)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or run_dir}: cannot be removed or locked ({error.strerror}); prune as the user who owns"
            " the run"
        ) from None


def _prune(run_dir: Path, rules: CheckpointConfig, dry_run: bool) -> dict[str, Any]:
    listed = saved_in(run_dir)
    reader, broken = newest_valid(run_dir, other_owners=rules.other_owners)
    if reader is None:
        raise CheckpointError(
            f"{run_dir}: none of its checkpoints is intact, and none is removed ({'; '.join(broken.values())})"
        )
    paths = {path.name: path for path in listed}
    # The newest of what is looked at is the newest intact one, which the rules always keep.
    facts = read_facts(
        [path for name, path in paths.items() if name not in broken], {}, other_owners=rules.other_owners
    )
    kept = keep(facts.values(), rules)
    doomed = [name for name, each in facts.items() if each.step not in kept]
    size = sum(_bytes(read_manifest(paths[name], other_owners=rules.other_owners)) for name in doomed)
    if not dry_run:
        remove_leftovers(run_dir / "checkpoints")
        for name in doomed:
            remove_directory(paths[name])
    unusable = paths.keys() - facts.keys() - broken.keys()
    return {
        "removed": doomed,
        "bytes": size,
        "kept": {name: kept[each.step] for name, each in facts.items() if each.step in kept},
        "broken": broken | {name: f"{paths[name] / MANIFEST}: cannot be used" for name in sorted(unusable)},
        "dry_run": dry_run,
    }


def _manifests(path: Path, other_owners: bool) -> _Manifests:
    directories = [path] if (path / MANIFEST).is_file() else saved_in(path)
    manifests: _Manifests = {}
    for directory in directories:
        try:
            manifest = read_manifest(directory, other_owners=other_owners)
            step = facts_of(manifest).step
            named = directory.name == checkpoint_name(step) or directories == [path]  # a copy may have any name
            manifests[directory] = manifest if named else CheckpointError(f"{directory}: holds step {step}")
        except CheckpointError as error:
            manifests[directory] = error
    return manifests


def _describe(path: Path, manifests: _Manifests) -> dict[str, dict[str, Any]]:
    entries = {directory.name: _entry(directory, found) for directory, found in manifests.items()}
    try:
        rules = load_config(str(path / "run.yaml")).checkpoint
    except (ConfigError, OSError):  # a single checkpoint, an average, or a run of another version
        return entries
    usable = [facts_of(found) for found in manifests.values() if not isinstance(found, CheckpointError)]
    kept = keep(usable, rules) if usable else {}
    for entry in entries.values():
        if entry["problem"] is None:
            entry["kept"] = kept.get(entry["step"], [])
    return entries


def _entry(directory: Path, found: CheckpointManifest | CheckpointError) -> dict[str, Any]:
    if isinstance(found, CheckpointError):
        return {"name": directory.name, "problem": str(found)}
    facts = facts_of(found)
    return {
        "name": directory.name,
        "problem": None,
        **dataclasses.asdict(found.progress),
        "bytes": _bytes(found),
        "files": len(found.files),
        "ranks": found.world_size,
        "optimizer_state": found.optimizer_state,
        "time": found.time,
        "verdict": facts.verdict,
        "validation_loss": facts.loss,
        "kept": None,
    }


def _bytes(found: CheckpointManifest | CheckpointError) -> int:
    return 0 if isinstance(found, CheckpointError) else sum(entry["bytes"] for entry in found.files.values())
