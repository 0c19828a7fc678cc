"""What a checkpoint says of itself.

    checkpoints/step-00000100/
      shard-00000.safetensors   one a rank: the pieces of weights and optimizer state that it owns
      manifest.json             written last: counters, resolved config, every fragment's address, size and checksum of
                                every file, and a checksum of its own

A checkpoint is written under a hidden name and renamed when everything is on disk, so a directory under its final name
is complete; that it is also intact is checked when it is read.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from pipeline.errors import CheckpointError

FORMAT = "rookery-checkpoint"
SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
CHECKSUM = "xxh3_128"
WEIGHT = "weight"
REMEDY = "restore it from a copy, or do without this checkpoint"

_NAME = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_END = ',\n "{name}": "{value}"\n}}\n'


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is. Everything else about the next step follows from the configuration.

    Attributes:
        step: completed optimizer steps.
        samples: samples consumed, those that a rollback left out included.
        tokens: tokens trained on.
        sample_hash: rolling hash of the ids of all samples trained on (pipeline/sample_hash.py).
        branch: number of rollbacks so far (pipeline/rollback.py).
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    sample_hash: str = ""
    branch: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """What a checkpoint says of itself. The fields are the keys of manifest.json.

    Attributes:
        progress: counters at the time of saving.
        config: the resolved configuration of the run.
        data_fingerprint: fingerprint of the training data so far.
        tokenizer_sha256: identity of the tokenizer.
        shapes: parameter name -> shape.
        run: identity of the run; empty for what no run wrote.
        attempt: number of the launch that wrote it.
        time: unix seconds.
        loss_scale: state of the loss scaling; empty unless train.precision=fp16.
        health: verdict ("healthy", "suspect" or "unknown") and the measurements that it rests on; empty if unknown.
        monitor: state of the detectors; empty without any.
        adjustments: of the learning rate by rollbacks, as `pipeline.rollback.Adjustment` has them.
        validation: step and loss (depth -> nats a token) of the newest validation; empty without one.
        proof: losses of the probe batch (depth -> nats a token) and their precision; empty without one.
        world_size: number of ranks that wrote it.
        optimizer_state: names of the optimizer's tensors; empty if no step was done.
        fragments: parameter name -> [file, start, numel] of each piece, in order of start.
        files: file name -> {"bytes", "xxh3_128"}.
    """

    progress: Progress
    config: dict[str, Any]
    data_fingerprint: str
    tokenizer_sha256: str
    shapes: dict[str, list[int]]
    run: str = ""
    attempt: int = 0
    time: float = 0.0
    loss_scale: dict[str, float] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)
    monitor: dict[str, Any] = field(default_factory=dict)
    adjustments: list[dict[str, Any]] = field(default_factory=list)
    validation: dict[str, Any] = field(default_factory=dict)
    proof: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    optimizer_state: list[str] = field(default_factory=list)
    fragments: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: str = FORMAT
    schema_version: int = SCHEMA_VERSION


def checkpoint_name(step: int) -> str:
    """Return the directory name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def checkpoints_in(directory: Path) -> list[Path]:
    """Return the complete checkpoints that lie directly in `directory`, oldest first; none if that is not there.

    Raises:
        OSError: it cannot be read, which must not be taken for emptiness.
    """
    try:
        with os.scandir(directory) as entries:
            found = [(int(match[1]), entry.name) for entry in entries if (match := _NAME.fullmatch(entry.name))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [directory / name for _, name in sorted(found) if (directory / name).is_dir()]


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run on the shared file system, oldest first."""
    return checkpoints_in(run_dir / "checkpoints")


def encode_manifest(manifest: CheckpointManifest) -> bytes:
    """Return the content of manifest.json, in which every byte is covered by the checksum at its end."""
    fields = {**vars(manifest), "progress": vars(manifest.progress)}
    lines = [f' "{name}": {json.dumps(value, separators=(",", ":"))}' for name, value in fields.items()]
    body = ("{\n" + ",\n".join(lines)).encode()
    return body + _end(body)


def _end(body: bytes) -> bytes:
    return _END.format(name=CHECKSUM, value=xxhash.xxh3_128_hexdigest(body)).encode()


def read_manifest(directory: Path, *, other_owners: bool = False) -> CheckpointManifest:
    """Return the manifest of a checkpoint, of which nothing else is looked at.

    Raises:
        CheckpointError: it is missing, damaged, of another format or owner, or names files outside its directory.
    """
    return decode_manifest(read_manifest_bytes(directory, other_owners=other_owners), directory / MANIFEST)


def read_manifest_bytes(directory: Path, *, other_owners: bool = False) -> bytes:
    """Return what is in a checkpoint's manifest.json.

    Raises:
        CheckpointError: it is missing or of another owner.
    """
    path = directory / MANIFEST
    try:
        check_file(directory, is_directory=True, other_owners=other_owners)
        with open_file(path, other_owners=other_owners) as file:
            return file.readall()
    except OSError:
        raise CheckpointError(
            f"{path}: no such checkpoint; name a run directory or one of its checkpoints/step-* directories"
        ) from None


def decode_manifest(content: bytes, path: Path) -> CheckpointManifest:
    """Return the manifest that was read from `path`.

    Raises:
        CheckpointError: it is damaged, of another format, or names files outside its directory.
    """
    body = content[: -len(_end(b""))]
    if content != body + _end(body):
        raise CheckpointError(f"{path}: was damaged or changed after it was written; {REMEDY}")
    try:
        fields = json.loads(content)
        del fields[CHECKSUM]
        if (fields["format"], fields["schema_version"]) != (FORMAT, SCHEMA_VERSION):
            raise CheckpointError(f"{path}: not a checkpoint of format {FORMAT} {SCHEMA_VERSION}")
        manifest = CheckpointManifest(**{**fields, "progress": Progress(**fields["progress"])})
        step: Any = manifest.progress.step
        if not isinstance(step, int) or step < 0:
            raise CheckpointError(f"{path}: of step {step!r}; {REMEDY}")
        for entry in manifest.files.values():
            int(entry["bytes"]), str(entry[CHECKSUM])
        named = {file for pieces in manifest.fragments.values() for file, _, _ in pieces}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: broken ({error}); {REMEDY}") from None
    for name in named | manifest.files.keys():
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{path}: names the file {name!r}, outside its directory")
    if unknown := sorted(named - manifest.files.keys()):
        raise CheckpointError(f"{path}: has pieces in {unknown[0]}, of which it gives no checksum")
    return manifest


def check_file(path: Path, *, is_directory: bool = False, other_owners: bool) -> os.stat_result:
    """Return the state of a file or directory of a checkpoint.

    Raises:
        CheckpointError: it is a link or something else than it should be, or belongs to another user than this one or
            root.
        OSError: it is not there.
    """
    status = path.lstat()
    if not (stat.S_ISDIR if is_directory else stat.S_ISREG)(status.st_mode):
        kind = "directory" if is_directory else "plain file"
        raise CheckpointError(f"{path}: not a {kind} (a link?); checkpoints hold none but those")
    if not other_owners and status.st_uid not in (0, os.getuid()):
        raise CheckpointError(
            f"{path}: belongs to another user (uid {status.st_uid}); if you trust them: checkpoint.other_owners=true in"
            " training, --other-owners elsewhere"
        )
    return status


def open_file(path: Path, *, other_owners: bool = False) -> io.FileIO:
    """Open a file of a checkpoint for reading: a plain one, and the very one whose owner was looked at.

    Raises:
        CheckpointError: it is a link or no plain file, or belongs to another user than this one or root.
        OSError: it is not there, or cannot be read.
    """
    status = check_file(path, other_owners=other_owners)
    # Without waiting: it could be exchanged for a pipe now.
    file = io.FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK))
    if not os.path.samestat(status, os.fstat(file.fileno())):
        file.close()
        raise CheckpointError(f"{path}: was exchanged for another file while it was opened")
    return file
