"""The same checkpoint in another number of files, apart from its run: to keep, send, evaluate and export."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_prep.files import published_output, sync_path
from pipeline.checkpoints.commit import Part, commit, complete, make_partial, shard_name
from pipeline.checkpoints.manifest import WEIGHT, CheckpointManifest, encode_manifest
from pipeline.checkpoints.reader import CheckpointReader, resolve_checkpoint
from pipeline.checkpoints.shard import Piece, SafetensorsWriter, tensor_key
from pipeline.errors import CheckpointError, ConfigError

_MOST_SHARDS = 65_536

Kinds = Mapping[str, Iterable[str]]
"""Parameter -> "weight" and its optimizer states; all are float32."""
Read = Callable[[str, str, int, int], torch.Tensor]
"""(parameter, kind, start, numel) -> (numel,) elements of the flattened tensor."""


def convert_checkpoint(
    checkpoint: Path, out: Path, *, shards: int = 1, with_optimizer: bool = True, other_owners: bool = False
) -> dict[str, Any]:
    """Write a checkpoint as `shards` files of equal size; one piece of one tensor is in memory at a time.

    What the manifest says of the training is kept. With the optimizer's state, `out`/checkpoints/step-* can be put into
    the run's checkpoints and resumed from; the config and the tokenizer decide that as ever.

    Args:
        checkpoint: a checkpoint, or a run for its newest intact one; every file is compared with its checksum first.
        out: directory to make; it holds checkpoints/step-.../ and the tokenizer, so that evaluation and export take it
            as they take a run.
        shards: number of files.
        with_optimizer: write the optimizer's state as well.
        other_owners: read files that belong to another user.

    Returns:
        out, checkpoint (the directory in it), step, files, bytes, optimizer_state (names).

    Raises:
        ConfigError: `shards` is not positive, or beyond any use.
        CheckpointError: the checkpoint or the tokenizer is missing or broken, or what was written does not read back.
        DataError: `out` exists, or there is no room for it.
    """
    if not 1 <= shards <= _MOST_SHARDS:
        raise ConfigError(f"--shards {shards}: a checkpoint has at least one file, and at most {_MOST_SHARDS} here")
    reader = resolve_checkpoint(checkpoint, other_owners=other_owners)
    source = reader.manifest
    kinds: Kinds = stored_kinds(reader)
    if not with_optimizer:
        kinds = dict.fromkeys(kinds, (WEIGHT,))
        source = replace(source, loss_scale={})
    with apart_from_run(reader.directory.parent.parent, out) as partial:
        written = write_checkpoint(partial, source, cut(source.shapes, shards), kinds, reader.slice)
        try:
            manifest = CheckpointReader(written).manifest  # compares what is on the disk with what was written
        except CheckpointError as error:
            problem = str(error).replace(str(partial), str(out))
            raise CheckpointError(f"{out}: does not read back as it was written ({problem}); convert again") from None
        name = written.name
    return {
        "out": str(out),
        "checkpoint": str(out / "checkpoints" / name),
        "step": manifest.progress.step,
        "files": len(manifest.files),
        "bytes": sum(entry["bytes"] for entry in manifest.files.values()),
        "optimizer_state": manifest.optimizer_state,
    }


@contextmanager
def apart_from_run(run_dir: Path, out: Path) -> Iterator[Path]:
    """Yield a temporary directory with the run's tokenizer, which becomes `out` when the block ends.

    Raises:
        CheckpointError: the run has no tokenizer.
        DataError: `out` exists, or there is no room for it.
    """
    tokenizer = run_dir / "tokenizer"
    if not tokenizer.is_dir():
        raise CheckpointError(f"{tokenizer}: missing, so {out} could not be used; restore it")
    with published_output(out) as partial:
        copy = Path(shutil.copytree(tokenizer, partial / "tokenizer"))
        for path in (*copy.iterdir(), copy):
            sync_path(path)
        yield partial


def write_checkpoint(
    run_dir: Path, source: CheckpointManifest, layout: list[list[Piece]], kinds: Kinds, read: Read
) -> Path:
    """Write `run_dir`/checkpoints/step-*, one tensor of `read` in memory at a time; return the directory.

    Args:
        run_dir: a directory that nobody else writes to.
        source: what it says of the training is kept; its files are not.
        layout: the pieces of each file.
        kinds: what there is of each parameter.
        read: yields the content.
    """
    partial = make_partial(run_dir / "checkpoints", source.progress.step)
    parts = []
    for number, pieces in enumerate(layout):
        name = shard_name(number)
        tensors = {
            tensor_key(parameter, start, kind): ((numel,), torch.float32)
            for parameter, start, numel in pieces
            for kind in kinds[parameter]
        }
        with SafetensorsWriter(partial / name, tensors) as writer:
            for parameter, start, numel in pieces:
                for kind in kinds[parameter]:
                    writer.write(tensor_key(parameter, start, kind), read(parameter, kind, start, numel))
        states = {kind for parameter, *_ in pieces for kind in kinds[parameter]} - {WEIGHT}
        parts.append(Part(file=name, entry=writer.entry, pieces=pieces, optimizer_state=sorted(states)))
    manifest = replace(complete(source, parts), time=source.time, world_size=source.world_size)
    return commit(partial, encode_manifest(manifest))


def cut(shapes: Mapping[str, list[int]], shards: int) -> list[list[Piece]]:
    """Return the pieces of each of `shards` files, which get equal numbers of elements; fewer if there are too few."""
    total = sum(math.prod(shape) for shape in shapes.values())
    files: list[list[Piece]] = []
    for number in range(shards):
        first, last = total * number // shards, total * (number + 1) // shards
        pieces, begin = [], 0
        for parameter, shape in shapes.items():
            end = begin + math.prod(shape)
            start, stop = max(first, begin), min(last, end)
            if start < stop:
                pieces.append((parameter, start - begin, stop - start))
            begin = end
        files.append(pieces)
    return [pieces for pieces in files if pieces]


def stored_kinds(reader: CheckpointReader) -> dict[str, list[str]]:
    """Return what a checkpoint has of each parameter: optimizers may keep other states for other parameters."""
    kinds: dict[str, set[str]] = {}
    for file in reader.manifest.files:
        for key in reader.tensor_names(file):
            address, _, kind = key.rpartition(":")
            kinds.setdefault(address.rpartition("@")[0], set()).add(kind)
    return {parameter: sorted(stored, key=lambda kind: (kind != WEIGHT, kind)) for parameter, stored in kinds.items()}
