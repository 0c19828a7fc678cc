"""Proof that a dataset is what its manifest says, read byte by byte."""

from __future__ import annotations

from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import file_sha256
from data_prep.manifest import SHARD_FILE, Manifest, Part, part_problem
from data_prep.shards import shard_bytes


def verify_dataset(directory: Path) -> list[str]:
    """Return what is wrong with the dataset, one message a problem; an empty list means that it is whole.

    Checks the manifest against itself, every shard's size and sha256 against the manifest, and that zarr sees the
    array that the manifest describes.
    """
    try:
        manifest = Manifest.read(directory)
    except DataError as error:
        return [str(error)]
    problems = [problem for part in manifest.parts for problem in _part_problems(directory, manifest, part)]
    named = {part.path for part in manifest.parts}
    strangers = sorted(path.name for path in directory.glob("part-*") if path.name not in named)
    return problems + [f"{directory / name}: not in the manifest" for name in strangers]


def _part_problems(directory: Path, manifest: Manifest, part: Part) -> list[str]:
    missing_or_cut = part_problem(directory, part)
    if missing_or_cut is not None:
        return [missing_or_cut]
    problems = []
    expected = shard_bytes(part.rows, manifest.row_bytes)
    if part.bytes != expected:
        problems.append(f"{directory / part.path}: {part.rows} rows take {expected} bytes, not {part.bytes}")
    shard = directory / part.path / SHARD_FILE
    if file_sha256(shard) != part.sha256:
        problems.append(f"{shard}: its sha256 is not the manifest's; restore the file or rebuild the dataset")
    return problems + _array_problems(directory / part.path, manifest, part)


def _array_problems(path: Path, manifest: Manifest, part: Part) -> list[str]:
    import zarr

    try:
        array = zarr.open_array(path, mode="r")
    except Exception as error:  # zarr raises anything for damaged metadata, and all of it is a finding
        return [f"{path / 'zarr.json'}: zarr cannot open this array ({error})"]
    found = (array.shape, array.shards, array.chunks, array.dtype)
    shape, row = (part.rows, manifest.row_tokens), (1, manifest.row_tokens)
    if found != (shape, shape, row, manifest.numpy_dtype):
        return [f"{path / 'zarr.json'}: describes another array than the manifest"]
    return []
