"""Reading checkpoints: any slice of any parameter from whatever pieces it lies in, and which checkpoint to read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from pipeline.checkpoints.manifest import (
    CHECKSUM,
    MANIFEST,
    REMEDY,
    WEIGHT,
    CheckpointManifest,
    checkpoint_name,
    list_checkpoints,
    open_file,
    read_manifest,
)
from pipeline.checkpoints.shard import SafetensorsFile, file_checksum, tensor_key
from pipeline.errors import CheckpointError

# A checkpoint may have more files than a process may have open (1024 by default), and averages read many checkpoints.
# Neighbouring elements lie in the same file or in the next.
_OPEN_FILES = 8


class CheckpointReader:
    """An intact checkpoint, read slice by slice.

    Args:
        directory: a checkpoint directory.
        other_owners: take files that belong to another user.
        manifest: its manifest, if it has been read and the files been compared with it, which the ranks of a job share
            out; without it every file is compared here with its recorded size and checksum.

    Raises:
        CheckpointError: it is missing, of another format or owner, or a file is not what the manifest says.
    """

    def __init__(
        self, directory: Path, *, other_owners: bool = False, manifest: CheckpointManifest | None = None
    ) -> None:
        self.directory = directory
        if manifest is None:
            manifest = read_manifest(directory, other_owners=other_owners)
            check_files(directory, manifest, manifest.files, other_owners=other_owners)
        self.manifest = manifest
        self._other_owners = other_owners
        self._files: dict[str, SafetensorsFile] = {}
        self._open: dict[str, SafetensorsFile] = {}  # those that were used last, in that order

    def read(self, parameter: str, kind: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` (numel,) with the elements of a flattened parameter's `kind` from number `start` on.

        Args:
            parameter: the reference's name.
            kind: "weight" or the name of an optimizer state.
            start: first element.
            out: float32, on any device.

        Raises:
            CheckpointError: the checkpoint does not have all of them.
        """
        filled, end = start, start + out.numel()
        for file, piece_start, piece_numel in self.manifest.fragments[parameter]:
            last = min(end, piece_start + piece_numel)
            if piece_start <= filled < last:
                key = tensor_key(parameter, piece_start, kind)
                self._opened(file).read(key, filled - piece_start, out[filled - start : last - start])
                filled = last
        if filled < end:
            raise CheckpointError(f"{self.directory}: {parameter} lacks elements of [{start}, {end})")

    def _opened(self, name: str) -> SafetensorsFile:
        if name not in self._files:  # a rank of thousands needs few of the shards
            self._files[name] = SafetensorsFile(self.directory / name, other_owners=self._other_owners)
        self._open.pop(name, None)
        self._open[name] = self._files[name]
        if len(self._open) > _OPEN_FILES:
            self._open.pop(next(iter(self._open))).close()
        return self._files[name]

    def tensor_names(self, file: str) -> list[str]:
        """Return the names of the tensors in one of its files."""
        return self._opened(file).names

    def slice(self, parameter: str, kind: str, start: int, numel: int) -> torch.Tensor:
        """Return elements [start, start + numel) of a flattened parameter's `kind`, float32; see `read`."""
        found = torch.empty(numel)
        self.read(parameter, kind, start, found)
        return found

    def weight(self, parameter: str) -> torch.Tensor:
        """Return a whole parameter, float32, in its shape."""
        shape = self.manifest.shapes[parameter]
        return self.slice(parameter, WEIGHT, 0, int(torch.Size(shape).numel())).view(shape)


def check_files(
    directory: Path, manifest: CheckpointManifest, names: Iterable[str], *, other_owners: bool = False
) -> None:
    """Compare files of a checkpoint with what its manifest says of them.

    Raises:
        CheckpointError: with the first file that is missing, of another owner, or not what it was.
    """
    for name in names:
        path, expected = directory / name, manifest.files[name]
        try:
            with open_file(path, other_owners=other_owners) as file:
                size = os.fstat(file.fileno()).st_size
                intact = size == expected["bytes"] and file_checksum(file) == expected[CHECKSUM]
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing; {REMEDY}") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from None
        if not intact:
            raise CheckpointError(f"{path}: does not match its recorded size and checksum; {REMEDY}")


def saved_in(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run on the shared file system, oldest first; there is at least one.

    Raises:
        CheckpointError: there is no such run, it has none, or they cannot be looked at.
    """
    try:
        found = list_checkpoints(run_dir)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}); make it readable") from None
    if found:
        return found
    if (run_dir / "run.yaml").is_file():
        raise CheckpointError(
            f"{run_dir}: the run has no checkpoint on the shared file system yet; start it again: `rookery train`"
        )
    what = "neither a run with a checkpoint nor a checkpoint" if run_dir.exists() else "no such run or checkpoint"
    raise CheckpointError(f"{run_dir}: {what}; name a directory that `rookery train` wrote")


def newest_valid(run_dir: Path, *, other_owners: bool = False) -> tuple[CheckpointReader | None, dict[str, str]]:
    """Return the newest intact checkpoint, if any, and name -> problem of the newer ones that were passed over."""
    problems: dict[str, str] = {}
    for path in reversed(list_checkpoints(run_dir)):
        try:
            reader = CheckpointReader(path, other_owners=other_owners)
            if path.name == checkpoint_name(reader.manifest.progress.step):
                return reader, problems
            problems[path.name] = f"{path}: holds step {reader.manifest.progress.step}"
        except (CheckpointError, OSError) as error:
            problems[path.name] = str(error)
    return None, problems


def resolve_checkpoint(path: Path, *, other_owners: bool = False) -> CheckpointReader:
    """Open a checkpoint directory, or the newest intact checkpoint of a run directory.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).is_file():
        return CheckpointReader(path, other_owners=other_owners)
    saved_in(path)
    reader, problems = newest_valid(path, other_owners=other_owners)
    if reader is None:
        raise CheckpointError(f"{path}: none of its checkpoints is intact ({'; '.join(problems.values())})")
    return reader
