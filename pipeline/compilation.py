"""torch.compile of one iteration of the core, and the folder of what it made, which can be shipped.

The number of iterations is never in a graph: one graph with gradient and one without serve every depth.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import stat
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline import job_variables
from pipeline.accelerator import architecture, describe, has_accelerator
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.blocks import Positions
    from pipeline.config import RunConfig
    from pipeline.model import RecurrentDepthModel

# The others record CUDA graphs, whose outputs the next iteration would overwrite before the backward pass reads them.
MODES = ("default", "max-autotune-no-cudagraphs")

_CODE = ("kernels", "pipeline/blocks.py", "pipeline/injection.py", "pipeline/recompute.py", "pipeline/recurrence.py")
_FOLDER = "rookery-kernels-"
_LOCATIONS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


@dataclass(kw_only=True)
class CompileConfig:
    """torch.compile of one iteration of the core."""

    enabled: bool = False
    """Compile it at the first step; every depth then uses the same two graphs."""
    mode: str = "default"
    """As torch.compile's: default, or max-autotune-no-cudagraphs, which tries more kernels and takes minutes."""
    cache_dir: str | None = None
    """Where compiled kernels are kept for the next start, one archive a version of code, PyTorch and device; null: not
    at all."""

    def __post_init__(self) -> None:
        """Refuse modes that are not there."""
        if self.mode not in MODES:
            raise ConfigError(f"train.compile.mode: {self.mode!r} is not one of {', '.join(MODES)}")

    def check(self, stage: int) -> None:
        """Refuse what compiles anew again and again.

        Raises:
            ConfigError: ZeRO stage 3.
        """
        if self.enabled and stage == 3:
            raise ConfigError(
                "train.compile.enabled: true with zero.stage = 3, which moves the weights to other storages for every"
                " pass, so that each is compiled anew; use zero.stage=2, or train.compile.enabled=false"
            )


def compiler_problem() -> str | None:
    """Return why torch.compile cannot work on this machine, or None when it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler is found; install g++, or name one in the environment variable CXX"
    if has_accelerator() and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; install the one that belongs to this PyTorch"
    return None


def compile_core(model: RecurrentDepthModel, mode: str = "default", *, sequences_vary: bool = False) -> None:
    """Make the loop of `model` use a compiled iteration; nothing is compiled before it is first called.

    Args:
        model: the model, before DeepSpeed wraps it.
        mode: see `CompileConfig`.
        sequences_vary: whether the loop is called with batches of several sizes (`depth.scope` per_sequence): then one
            graph serves all of two and more sequences.
    """
    recurrence = model.transformer.recurrence
    compiled = torch.compile(recurrence.kept_iterate, mode=mode, dynamic=None if sequences_vary else False)

    def step(state: torch.Tensor, injected: torch.Tensor, positions: Positions) -> torch.Tensor:
        if sequences_vary and len(state) > 1:
            for tensor in (state, injected, *([] if positions.mask is None else [positions.mask])):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)  # noqa: SLF001 (torch documents it under this name)
        output: torch.Tensor = compiled(state, injected, positions)
        return output

    recurrence.compiled = step


def use_compiled_core(config: RunConfig, model: RecurrentDepthModel, device: torch.device) -> KernelCache:
    """Compile the core of `model` as `train.compile` says; return where its kernels lie."""
    wanted = config.train.compile
    kernels = KernelCache(None if wanted.cache_dir is None else Path(wanted.cache_dir), device, wanted.mode)
    compile_core(model, wanted.mode, sequences_vary=config.depth.scope == "per_sequence")
    return kernels


class KernelCache:
    """What torch.compile makes, in a folder of this process alone, from and for an archive that all share.

    Processes that share one folder race for it, on parallel file systems above all; one file can be broadcast to nodes.
    The folder lies in the temporary directory and goes when the process ends. An archive is code: one that belongs to
    another user than this one or root, or that others may write, is passed over, and so is a damaged one. Where the
    environment names a folder and the configuration none, that one is used, whoever shares it.

    Args:
        directory: of the archives, which need not exist; None for none.
        device: of this rank.
        mode: see `CompileConfig`.

    Attributes:
        archive: the file, or None.
        passed_over: why there is an archive that is not used, None if that is not so.
    """

    def __init__(self, directory: Path | None, device: torch.device, mode: str) -> None:
        self.archive = None if directory is None else directory / f"{cache_key(device, mode)}.tar"
        _remove_folders_of_ended_processes()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        source = self._source()
        self.passed_over = None if source is None else self._unpack(source)
        for name, folder in _LOCATIONS.items():
            if self.archive is not None or name not in os.environ:
                os.environ[name] = str(self._folder / folder)
        self._published = self._files()

    def _source(self) -> Path | None:
        """Return the archive to read: the node's own copy, else the shared one; None if there is none."""
        if self.archive is None:
            return None
        staged = os.environ.get(job_variables.STAGED_KERNELS)
        places = [Path(staged) / self.archive.name] if staged else []
        return next((path for path in (*places, self.archive) if path.exists()), None)

    def _unpack(self, path: Path) -> str | None:
        """Fill the folder from an archive; return why it was left empty, if it was."""
        partial = self._folder / ".partial"
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid not in (0, os.getuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    return f"{path} belongs to user {status.st_uid}, mode {stat.filemode(status.st_mode)}"
                with tarfile.open(fileobj=file) as archive:
                    archive.extractall(partial, filter="data")
            for entry in list(partial.iterdir()):
                entry.rename(self._folder / entry.name)
            partial.rmdir()
        except (tarfile.TarError, EOFError, OSError) as error:
            shutil.rmtree(partial, ignore_errors=True)  # half a library is worse than none
            return f"{path}: {error}"
        return None

    def publish(self) -> bool:
        """Write the archive if something was compiled since it was read or written; rank 0 alone calls this.

        Raises:
            OSError: the directory cannot be written.
        """
        files = self._files()
        if self.archive is None or files == self._published:
            return False
        self.archive.parent.mkdir(parents=True, exist_ok=True)
        part = self.archive.with_name(f".{self.archive.name}.{os.getpid()}.part")
        with part.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as archive:
                for name in sorted(files):
                    archive.add(self._folder / name, name)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        part.rename(self.archive)
        self._published = files
        return True

    def _files(self) -> frozenset[str]:
        found = (path for path in self._folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".tmp"))
        return frozenset(str(path.relative_to(self._folder)) for path in found)


def cache_key(device: torch.device, mode: str) -> str:
    """Return a name that differs wherever compiled kernels may: by code, PyTorch, Python, device and mode."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for place in _CODE:
        for path in sorted((root / place).rglob("*.py")) if (root / place).is_dir() else [root / place]:
            digest.update(path.read_bytes())
    facts = {**describe(device), "machine": platform.machine(), "python": platform.python_version(), "mode": mode}
    digest.update(json.dumps(facts | {"architecture": architecture(device)}, sort_keys=True).encode())
    return f"torch-{torch.__version__}-{digest.hexdigest()[:16]}"


def _remove_folders_of_ended_processes() -> None:
    """A process that is killed leaves its folder behind, in a /tmp that is memory on many nodes."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        pid = folder.name.removeprefix(_FOLDER).split("-")[0]
        with suppress(OSError):
            if folder.stat().st_uid == os.getuid() and pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(folder, ignore_errors=True)
