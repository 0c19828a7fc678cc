"""Checkpoints addressed by fragments: any reader finds any slice of any parameter, and nothing is ever unpickled.

    checkpoints/step-00000100/
      shard-00000.safetensors   one a rank: the pieces of weights and optimizer state that it owns
      manifest.json             written last: counters, resolved config, every fragment's address, size and sha256 of
                                every file

A checkpoint is written under a temporary name and renamed when everything is on disk, so a directory under its final
name is complete; that it is also intact is checked when it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from data_prep.files import file_sha256, sync_path
from data_prep.world import World
from pipeline.engine import Fragment
from pipeline.errors import CheckpointError, ConfigError

FORMAT = "rookery-checkpoint"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
WEIGHT = "weight"


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 100
    """Steps between checkpoints; one more is written at the end of the run."""
    keep_last: int = 3
    """Number of newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.every < 1:
            raise ConfigError(f"checkpoint.every: {self.every} is not positive")
        if self.keep_last < 2:
            raise ConfigError(f"checkpoint.keep_last: {self.keep_last} leaves nothing to fall back to; use at least 2")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is. Everything else about the next step follows from the configuration.

    Attributes:
        step: completed optimizer steps.
        samples: samples consumed.
        tokens: tokens trained on.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """What a checkpoint says of itself. The fields are the keys of manifest.json.

    Attributes:
        progress: counters at the time of saving.
        config: the resolved configuration of the run.
        data_fingerprint: fingerprint of the training dataset.
        tokenizer_sha256: identity of the tokenizer.
        world_size: number of ranks that wrote it.
        optimizer_state: names of the optimizer's tensors; empty if no step was done.
        shapes: parameter name -> shape.
        fragments: parameter name -> [file, start, numel] of each piece, in order of start.
        files: file name -> {"bytes", "sha256"}.
        loss_scale: state of the loss scaling; empty unless train.precision=fp16.
    """

    progress: Progress
    config: dict[str, Any]
    data_fingerprint: str
    tokenizer_sha256: str
    world_size: int
    optimizer_state: list[str]
    shapes: dict[str, list[int]]
    fragments: dict[str, list[tuple[str, int, int]]]
    files: dict[str, dict[str, Any]]
    loss_scale: dict[str, float] = field(default_factory=dict)
    format: str = field(default=FORMAT)
    schema_version: int = field(default=SCHEMA_VERSION)


def checkpoint_name(step: int) -> str:
    """Return the directory name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-????????") if path.is_dir())


def save_checkpoint(  # noqa: PLR0913 (what the manifest says comes from many places)
    run_dir: Path,
    world: World,
    fragments: Iterator[Fragment],
    shapes: dict[str, list[int]],
    *,
    progress: Progress,
    config: dict[str, Any],
    data_fingerprint: str,
    tokenizer_sha256: str,
    loss_scale: dict[str, float] | None = None,
) -> Path:
    """Write a checkpoint from every rank's fragments; a collective. Returns its directory.

    Raises:
        OSError: on every rank, if any could not write; no directory appears under the final name.
    """
    final = run_dir / "checkpoints" / checkpoint_name(progress.step)
    partial = final.with_name(f".{final.name}.partial")
    with world.guard("checkpoint directory"):
        if world.rank == 0:
            for leftover in final.parent.glob(".step-*"):  # of a save or a removal that was killed
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
    with world.guard("checkpoint write"):
        name, pieces, state_names = _write_shard(partial, world.rank, fragments)
        entry = {"bytes": (partial / name).stat().st_size, "sha256": file_sha256(partial / name)}
    gathered = world.gather((name, entry, pieces, state_names))
    with world.guard("checkpoint commit"):
        if gathered is not None:
            manifest = CheckpointManifest(
                progress=progress,
                config=config,
                data_fingerprint=data_fingerprint,
                tokenizer_sha256=tokenizer_sha256,
                world_size=world.size,
                optimizer_state=sorted({state for *_, states in gathered for state in states}),
                shapes=shapes,
                fragments=_merge_fragments(gathered),
                files={file: entry for file, entry, *_ in gathered},
                loss_scale=loss_scale or {},
            )
            _commit(partial, final, manifest)
    return final


def _write_shard(
    directory: Path, rank: int, fragments: Iterator[Fragment]
) -> tuple[str, list[tuple[str, int, int]], list[str]]:
    tensors: dict[str, torch.Tensor] = {}
    pieces: list[tuple[str, int, int]] = []
    states: set[str] = set()
    for fragment in fragments:
        pieces.append((fragment.parameter, fragment.start, fragment.weight.numel()))
        states.update(fragment.optimizer_state)
        for kind, tensor in {WEIGHT: fragment.weight, **fragment.optimizer_state}.items():
            tensors[_tensor_key(fragment.parameter, fragment.start, kind)] = tensor.detach().cpu().contiguous()
    name = f"shard-{rank:05d}.safetensors"
    save_tensors(tensors, directory / name)
    return name, pieces, sorted(states)


def _merge_fragments(
    gathered: list[tuple[str, Any, list[tuple[str, int, int]], Any]],
) -> dict[str, list[tuple[str, int, int]]]:
    merged: dict[str, list[tuple[str, int, int]]] = {}
    for file, _, pieces, _ in gathered:
        for parameter, start, numel in pieces:
            merged.setdefault(parameter, []).append((file, start, numel))
    return {parameter: sorted(pieces, key=lambda piece: piece[1]) for parameter, pieces in merged.items()}


def _commit(partial: Path, final: Path, manifest: CheckpointManifest) -> None:
    fields = {**vars(manifest), "progress": vars(manifest.progress)}
    text = json.dumps({**fields, "sha256": _fields_sha256(fields)}, indent=1)
    (partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
    sync_path(partial / MANIFEST)
    sync_path(partial)
    if final.exists():  # an older, broken one of the same step: loading has already passed it over
        shutil.rmtree(final)
    partial.rename(final)
    sync_path(final.parent)


def _fields_sha256(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _tensor_key(parameter: str, start: int, kind: str) -> str:
    return f"{parameter}@{start}:{kind}"


class CheckpointReader:
    """An intact checkpoint, read slice by slice.

    Args:
        directory: a checkpoint directory.
        verify: compare every file with its recorded size and sha256; one rank does it for all.

    Raises:
        CheckpointError: it is missing, of another format, or a file is not what the manifest says.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        self.directory = directory
        self.manifest = _read_manifest(directory)
        for name, expected in self.manifest.files.items() if verify else ():
            path = directory / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; use an older checkpoint")
            if path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
                raise CheckpointError(f"{path}: does not match its recorded size and sha256; use an older checkpoint")
        self._files: dict[str, Any] = {}

    def slice(self, parameter: str, kind: str, start: int, numel: int) -> torch.Tensor:
        """Return elements [start, start + numel) of a flattened parameter's `kind`: "weight" or an optimizer state."""
        pieces = []
        for file, piece_start, piece_numel in self.manifest.fragments[parameter]:
            first, last = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if first < last:
                if file not in self._files:  # a rank of thousands needs few of the shards
                    self._files[file] = safe_open(self.directory / file, framework="pt")
                stored = self._files[file].get_slice(_tensor_key(parameter, piece_start, kind))
                pieces.append(stored[first - piece_start : last - piece_start])
        found = torch.cat(pieces) if pieces else torch.empty(0)
        if found.numel() != numel:
            raise CheckpointError(f"{self.directory}: {parameter} lacks elements of [{start}, {start + numel})")
        return found

    def weight(self, parameter: str) -> torch.Tensor:
        """Return a whole parameter, float32, in its shape."""
        shape = self.manifest.shapes[parameter]
        return self.slice(parameter, WEIGHT, 0, int(torch.Size(shape).numel())).view(shape)


def _read_manifest(directory: Path) -> CheckpointManifest:
    path = directory / MANIFEST
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("sha256") != _fields_sha256(fields):
            raise CheckpointError(f"{path}: was changed after it was written; use an older checkpoint")
        if fields["format"] != FORMAT or fields["schema_version"] != SCHEMA_VERSION:
            raise CheckpointError(f"{path}: not a checkpoint of format {FORMAT} {SCHEMA_VERSION}")
        manifest = CheckpointManifest(**{**fields, "progress": Progress(**fields["progress"])})
    except OSError:
        raise CheckpointError(
            f"{path}: no such checkpoint; name a run directory or one of its checkpoints/step-* directories"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: broken ({error}); use an older checkpoint") from None
    for name in manifest.files:
        if Path(name).name != name:
            raise CheckpointError(f"{path}: names the file {name!r}, outside its directory")
    return manifest


def newest_valid(run_dir: Path) -> tuple[CheckpointReader | None, dict[str, str]]:
    """Return the newest intact checkpoint, if any, and name -> problem of the newer ones that were passed over."""
    problems: dict[str, str] = {}
    for path in reversed(list_checkpoints(run_dir)):
        try:
            reader = CheckpointReader(path)
            if path.name == checkpoint_name(reader.manifest.progress.step):
                return reader, problems
            problems[path.name] = f"{path}: holds step {reader.manifest.progress.step}"
        except (CheckpointError, OSError) as error:
            problems[path.name] = str(error)
    return None, problems


def resolve_checkpoint(path: Path) -> CheckpointReader:
    """Open a checkpoint directory, or the newest intact checkpoint of a run directory.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).is_file():
        return CheckpointReader(path)
    reader, problems = newest_valid(path)
    if reader is None:
        detail = "; ".join(problems.values()) or "train it first: `rookery train CONFIG`"
        raise CheckpointError(f"{path}: neither a checkpoint nor a run with an intact one ({detail})")
    return reader


def describe_checkpoints(run_dir: Path, *, verify: bool) -> list[dict[str, Any]]:
    """Return what every checkpoint of a run says of itself, oldest first.

    Args:
        run_dir: the run.
        verify: compare every file with its recorded size and sha256, not just the manifest with itself.

    Returns:
        name, problem (None if none was found), and, if the manifest can be read, step, samples, tokens, ranks, bytes.

    Raises:
        CheckpointError: there is no such run, or it has no checkpoint.
    """
    paths = list_checkpoints(run_dir)
    if not paths:
        raise CheckpointError(f"{run_dir}: no run with a checkpoint; name a directory that `rookery train` wrote")
    return [_describe(path, verify) for path in paths]


def _describe(path: Path, verify: bool) -> dict[str, Any]:
    try:
        reader = CheckpointReader(path, verify=False)
    except CheckpointError as error:
        return {"name": path.name, "problem": str(error)}
    manifest = reader.manifest
    facts = {
        "name": path.name,
        **dataclasses.asdict(manifest.progress),
        "ranks": manifest.world_size,
        "bytes": sum(entry["bytes"] for entry in manifest.files.values()),
    }
    try:
        if verify:
            CheckpointReader(path)
    except (CheckpointError, OSError) as error:
        return {**facts, "problem": str(error)}
    return {**facts, "problem": None}


def prune_checkpoints(run_dir: Path, newest: Path, keep_last: int) -> list[str]:
    """Keep `newest` and the `keep_last` - 1 before it; return the names of the removed ones.

    What is numbered after `newest` was passed over when the run resumed from before it. It is moved aside, not
    removed: a person may want to know what happened to it.
    """
    checkpoints = list_checkpoints(run_dir)
    for path in checkpoints:
        if path.name > newest.name:
            aside = path.with_name(f"superseded-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    removed = [path for path in checkpoints if path.name <= newest.name][:-keep_last]
    for path in removed:
        # Hidden first: a directory under its final name is complete, also when we are killed here.
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.removed")))
    return [path.name for path in removed]


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file to disk with the permissions that the user's umask asks for."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)  # makes a new file that only its owner may read
    path.chmod(mode)
    sync_path(path)
