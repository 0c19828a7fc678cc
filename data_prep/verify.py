"""Proof that a dataset is what its manifest says, read byte by byte, by all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import file_sha256
from data_prep.job import PLAN_FILE, TOKENIZER_DIRECTORY
from data_prep.manifest import SHARD_FILE, Manifest, Part
from data_prep.shards import MASK_ARRAY, shard_bytes
from data_prep.world import World

Problems = dict[str, list[str]]


def verify_dataset(directory: Path, world: World | None = None) -> list[str]:
    """Return what is wrong with the dataset, one message a problem; an empty list means that it is whole.

    Checks the manifest against itself, every shard's size and sha256 against the manifest, that zarr sees the arrays
    that the manifest describes, and the files that the dataset can be repaired with. A collective of `world` (a single
    rank if None); every rank gets the same list.
    """
    world = world or World()
    manifest: Manifest | None = None
    problems: list[str] = []
    if world.rank == 0:
        try:
            manifest = Manifest.read(directory)
        except DataError as error:
            problems = [str(error)]
    manifest, problems = world.broadcast((manifest, problems))
    if manifest is None:
        return problems
    of_parts = broken_parts(directory, manifest, world)
    others = _problems_beside_parts(directory, manifest) if world.rank == 0 else []
    return [problem for part in of_parts.values() for problem in part] + world.broadcast(others)


def broken_parts(
    directory: Path, manifest: Manifest, world: World, on_part: Callable[[int], None] = lambda done: None
) -> Problems:
    """Return what is wrong with each broken part, by its name, in the order of the manifest. A collective.

    Args:
        directory: the dataset.
        manifest: its manifest.
        world: the ranks that share the parts.
        on_part: called with the number of parts that this rank has looked at.
    """
    mine: Problems = {}
    with world.guard("verify"):
        for done, part in enumerate(manifest.parts[world.rank :: world.size], start=1):
            found = _part_problems(directory, manifest, part)
            if found:
                mine[part.path] = found
            on_part(done)
    merged: Problems = {}
    for of_rank in world.allgather(mine):
        merged |= of_rank
    return {part.path: merged[part.path] for part in manifest.parts if part.path in merged}


def _problems_beside_parts(directory: Path, manifest: Manifest) -> list[str]:
    named = {part.path for part in manifest.parts}
    strangers = sorted(path.name for path in directory.glob("part-*") if path.name not in named)
    problems = [f"{directory / name}: not in the manifest" for name in strangers]
    tokenizer = manifest.provenance.get("settings", {}).get("tokenizer", {})
    beside = {directory / TOKENIZER_DIRECTORY / name: sha256 for name, sha256 in tokenizer.items()}
    for path, sha256 in {directory / PLAN_FILE: manifest.provenance.get("plan_sha256"), **beside}.items():
        if sha256 and (not path.is_file() or file_sha256(path) != sha256):
            problems.append(
                f"{path}: missing or changed; restore it. Rows can be read without it, but not repaired or shown"
            )
    return problems


def _part_problems(directory: Path, manifest: Manifest, part: Part) -> list[str]:
    path = directory / part.path
    row_bytes = manifest.row_bytes
    problems = _array_problems(path, part.rows, row_bytes, part.bytes, part.sha256)
    if not problems:
        problems = _metadata_problems(path, (part.rows, manifest.row_tokens), manifest.numpy_dtype.name)
    if part.mask_bytes:
        mask, mask_row = path / MASK_ARRAY, -(-manifest.row_tokens // 8)
        found = _array_problems(mask, part.rows, mask_row, part.mask_bytes, part.mask_sha256)
        problems += found or _metadata_problems(mask, (part.rows, mask_row), "uint8")
    return problems


def _array_problems(path: Path, rows: int, row_bytes: int, size: int, sha256: str) -> list[str]:
    shard = path / SHARD_FILE
    if size != shard_bytes(rows, row_bytes):
        return [f"{path}: {rows} rows take {shard_bytes(rows, row_bytes)} bytes, not {size}"]
    try:
        found = shard.stat().st_size
        if found != size:
            return [f"{shard}: {found} bytes, but the manifest says {size}"]
        if file_sha256(shard) != sha256:
            return [f"{shard}: its sha256 is not the manifest's; run `rookery data repair`, or restore the file"]
    except FileNotFoundError as error:
        return [f"{shard}: this shard of the dataset is missing ({error.strerror})"]
    except OSError as error:
        return [f"{shard}: cannot be read ({error.strerror})"]
    return []


def _metadata_problems(path: Path, shape: tuple[int, int], dtype: str) -> list[str]:
    import zarr

    try:
        array = zarr.open_array(path, mode="r")
    except Exception as error:  # zarr raises anything for damaged metadata, and all of it is a finding
        return [f"{path / 'zarr.json'}: zarr cannot open this array ({error})"]
    if (array.shape, array.shards, array.chunks, array.dtype.name) != (shape, shape, (1, shape[1]), dtype):
        return [f"{path / 'zarr.json'}: describes another array than the manifest"]
    return []
