"""The code of a run: what was on the submitting machine when it was submitted, kept beside what it computed."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from monitoring.runlog import sync_path

ROOMS = ("data_prep", "kernels", "monitoring", "pipeline", "rookery", "slurm")
FOLDER = "code"
_ROOT = Path(__file__).resolve().parents[1]
_SKIPPED = {"__pycache__"}
_COMPILED = (".pyc", ".so")


@cache
def code_digest() -> str:
    """Return 12 hexadecimal digits that name the six packages as they are now, with their data files."""
    digest = hashlib.sha256()
    for path in _files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_ROOT)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def write_snapshot(run_dir: Path) -> Path:
    """Copy the packages to `run_dir/code/DIGEST` unless they are there, and return that directory.

    It appears under its name whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    target = run_dir / FOLDER / code_digest()
    if target.is_dir():
        return target
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        for path in _files():
            copy = partial / path.relative_to(_ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            sync_path(copy)
        for folder, _, _ in os.walk(partial):
            sync_path(Path(folder))
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another submission was faster
                raise
        sync_path(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _files() -> Iterator[Path]:
    for room in ROOMS:
        for path in sorted((_ROOT / room).rglob("*")):
            parts = path.relative_to(_ROOT).parts
            hidden = any(part in _SKIPPED or part.startswith(".") for part in parts)
            if path.is_file() and not hidden and path.suffix not in _COMPILED:
                yield path
