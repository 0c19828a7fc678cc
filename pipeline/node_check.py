"""The check of nodes before a model is built: what is slow, ill or different shows in the first minute, by its name."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

from data_prep.world import World, first_line
from pipeline.accelerator import describe, device_memory, peak_flops, runtime_version, synchronize
from pipeline.errors import ConfigError, UnhealthyNodeError
from pipeline.launch import node_name, nodes_of_ranks, roll_call

T = TypeVar("T")

PACKAGES = ("deepspeed", "mpi4py", "numpy", "safetensors", "tokenizers", "torch", "zarr")
_ROOMS = ("data_prep", "kernels", "monitoring", "pipeline", "rookery")
_SECONDS_OF_GRACE = 3.0
_SECONDS_OF_GEMM = 0.05
_LEAST_PRODUCTS = 3
_PATTERN = 0xA5
_HOSTS_SHOWN = 8


@dataclass(kw_only=True)
class NodeCheckConfig:
    """The check of nodes before the model is built; a node that fails ends the run with exit code 13."""

    enabled: bool = True
    """Whether nodes are checked."""
    time_limit_seconds: float = 60.0
    """Longest wait in each stage; a rank that is not there then is named."""
    memory_mb: int | None = None
    """Device memory that is written and read back; null: 1024, on CPUs 16."""
    gemm_size: int | None = None
    """Rows and columns of the measured matrix product; null: 8192, on CPUs 384."""
    min_rate_ratio: float | None = None
    """Least rate of the product, as a part of the median of equal devices; null: 0.7, on CPUs 0.05 (shared cores)."""
    min_peak_ratio: float = 0.3
    """Least rate of the product, as a part of the device's peak where that is known."""
    allreduce_mb: list[int] = field(default_factory=list)
    """Sizes of the all-reduces, in order; empty: 16, 32, 64, 128, on CPUs 1, 4."""
    max_clock_skew_seconds: float = 5.0
    """Largest distance of a host's clock from the median of all."""
    min_free_gb: float = 1.0
    """Least free space of the run directory's file system, as each host sees it."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name in ("time_limit_seconds", "max_clock_skew_seconds"):
            if getattr(self, name) <= 0.0:
                raise ConfigError(f"node_check.{name}: {getattr(self, name)} is not positive")
        for name in ("memory_mb", "gemm_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"node_check.{name}: {getattr(self, name)} is not positive; null for the default")
        for name in ("min_rate_ratio", "min_peak_ratio"):
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                raise ConfigError(f"node_check.{name}: {getattr(self, name)} is not in [0, 1)")
        if any(size < 1 for size in self.allreduce_mb):
            raise ConfigError(f"node_check.allreduce_mb: {self.allreduce_mb} holds a size that is not positive")
        if self.min_free_gb < 0.0:
            raise ConfigError(f"node_check.min_free_gb: {self.min_free_gb} is negative")


@dataclass(kw_only=True)
class Findings:
    """What a rank found out about its node.

    Attributes:
        host: the node's name.
        device: the device's name.
        gemm_flops: best rate of the matrix product, FLOP/s.
        peak_flops: the device's peak, None if unknown.
        free_bytes: free space in the run directory.
        versions: name -> version or hash of what must be equal everywhere.
        clock: seconds since the epoch, read when all ranks had met.
        allreduce_gb_per_second: by size in MB: bytes reduced per second, 1e9.
        problem: what failed on this rank itself.
        hung: whether a stage did not end in its time.
    """

    host: str
    device: str = ""
    gemm_flops: float = 0.0
    peak_flops: float | None = None
    free_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    clock: float = 0.0
    allreduce_gb_per_second: dict[str, float] = field(default_factory=dict)
    problem: str | None = None
    hung: bool = False


def check_demands(config: NodeCheckConfig, world: World, device: torch.device, run_dir: Path) -> None:
    """Refuse what no node could pass, before a node is blamed for it; a collective that writes nothing.

    Raises:
        ConfigError: sizes beyond the device's memory, or too little free space for all ranks, so that the run
            directory's file system is full and no node is ill.
    """
    if not config.enabled:
        return
    with world.guard("node_check"):
        sharing = 1 if device.type == "cuda" else nodes_of_ranks().count(node_name())
        check_sizes(config, device.type, device_memory(device) // sharing)
        free = free_bytes(run_dir) if world.rank == 0 else 0
    least = config.min_free_gb * 1e9
    if world.broadcast(free) >= least:
        return
    with world.guard("node_check"):
        free = free_bytes(run_dir)
    most = max(world.allgather(free))
    with world.guard("node_check"):
        if most < least:
            raise ConfigError(
                f"node_check.min_free_gb: {config.min_free_gb}, and {run_dir} has {most / 1e9:.2f} GB free on every"
                " host; make room, choose another run_dir, or lower it"
            )


def check_sizes(config: NodeCheckConfig, kind: str, memory: int) -> None:
    """Refuse to measure with more than `memory` bytes, what a rank may use of a device of type `kind`.

    Raises:
        ConfigError: with the setting that needs more.
    """
    gpu = kind == "cuda"
    needed = {
        "memory_mb": 2 * (config.memory_mb or 0) * 2**20,  # what is written, and what comes of comparing it
        "gemm_size": 4 * (config.gemm_size or 0) ** 2 * (2 if gpu else 4),  # factors, product, and its check
        "allreduce_mb": max(config.allreduce_mb, default=0) * 2**20,
    }
    for name, size in needed.items():
        if size > memory:
            raise ConfigError(
                f"node_check.{name}: {getattr(config, name)} needs {size / 1e9:.1f} GB, and a rank has"
                f" {memory / 1e9:.1f} GB; lower it"
            )


def free_bytes(run_dir: Path) -> int:
    """Return the free space of the file system on which `run_dir` is or will be."""
    return shutil.disk_usage(next(path for path in (run_dir, *run_dir.parents) if path.exists())).free


def check_nodes(config: NodeCheckConfig, world: World, device: torch.device, run_dir: Path) -> list[dict[str, Any]]:
    """Check every node and the network between them; a collective, after the process group has been started.

    Returns:
        One record a rank, equal on all ranks: host, device, gemm_flops, peak_flops, free_bytes, clock_skew_seconds,
        allreduce_gb_per_second (by size in MB). Clocks are compared to within the time that ranks take to leave a
        barrier. Nothing if the check is switched off.

    Raises:
        UnhealthyNodeError: on every rank that still answers, with the hosts that failed.
    """
    if not config.enabled:
        return []
    own = Findings(host=node_name())
    _timed(own, "the device", config.time_limit_seconds, partial(_examine, own, config, device, run_dir))
    every = _report(own, world, config.time_limit_seconds, "check of devices")
    skews = clock_skews(every)
    _judge(world, every, faults(config, every, skews, device.type, run_dir))
    if world.size > 1:
        sizes = config.allreduce_mb or ([16, 32, 64, 128] if device.type == "cuda" else [1, 4])
        for size in sizes:
            if own.problem is None:
                work = partial(_reduce, own, size, device)
                _timed(own, f"an all-reduce of {size} MB", config.time_limit_seconds, work)
        every = _report(own, world, 0.0 if own.hung else len(sizes) * config.time_limit_seconds, "all-reduces")
        _judge(world, every, {rank: each.problem for rank, each in enumerate(every) if each.problem is not None})
    return [_record(each, skew) for each, skew in zip(every, skews, strict=True)]


def faults(
    config: NodeCheckConfig, every: Sequence[Findings], skews: Sequence[float], kind: str, run_dir: Path
) -> dict[int, str]:
    """Return rank -> what is wrong with its node; `kind` is the type of all devices, `skews` are seconds."""
    found: dict[int, str] = {rank: each.problem for rank, each in enumerate(every) if each.problem is not None}
    least = config.min_rate_ratio if config.min_rate_ratio is not None else (0.7 if kind == "cuda" else 0.05)
    usual = usual_versions(every)
    for rank, (each, skew) in enumerate(zip(every, skews, strict=True)):
        if rank in found:
            continue
        median = statistics.median_high(other.gemm_flops for other in every if other.device == each.device)
        different = [name for name in usual if each.versions.get(name) != usual[name]]
        if each.gemm_flops <= 0.0:
            found[rank] = "no matrix product has been measured"
        elif each.gemm_flops < least * median:
            found[rank] = f"matrix product at {each.gemm_flops:.3g} FLOP/s, the median is {median:.3g}"
        elif each.peak_flops is not None and each.gemm_flops < config.min_peak_ratio * each.peak_flops:
            found[rank] = f"matrix product at {each.gemm_flops:.3g} FLOP/s of a peak of {each.peak_flops:.3g}"
        elif different:
            name = different[0]
            found[rank] = f"{name} is {each.versions.get(name)}, and {usual[name]} on most ranks"
        elif abs(skew) > config.max_clock_skew_seconds:
            found[rank] = f"clock {skew:+.1f} s off the median"
        elif each.free_bytes < config.min_free_gb * 1e9:
            found[rank] = (
                f"{each.free_bytes / 1e9:.2f} GB free in {run_dir}, node_check.min_free_gb is {config.min_free_gb}"
            )
    return found


def usual_versions(every: Sequence[Findings]) -> dict[str, str]:
    """Return name -> the version that most ranks have; of several equally frequent ones the lowest rank's."""
    names = dict.fromkeys(name for each in every for name in each.versions)
    return {name: Counter(each.versions.get(name, "absent") for each in every).most_common(1)[0][0] for name in names}


def clock_skews(every: Sequence[Findings]) -> list[float]:
    """Return every rank's clock minus the median of all, seconds."""
    median = statistics.median(each.clock for each in every)
    return [each.clock - median for each in every]


@cache
def code_digest() -> str:
    """Return a sha256 of all Python files of this package as this process finds them."""
    digest = hashlib.sha256()
    for room in _ROOMS:
        spec = importlib.util.find_spec(room)
        for folder in (spec.submodule_search_locations or []) if spec is not None else []:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(f"{room}/{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {"the code of rookery": code_digest()[:12], "python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found | {"the runtime of torch": runtime_version()}


def _examine(own: Findings, config: NodeCheckConfig, device: torch.device, run_dir: Path) -> None:
    own.device = str(describe(device)["device"])
    own.peak_flops = peak_flops(device)
    own.versions = _versions()
    own.free_bytes = free_bytes(run_dir)
    gpu = device.type == "cuda"
    _try_memory((config.memory_mb or (1024 if gpu else 16)) * 2**20, device)
    own.gemm_flops = _gemm_rate(config.gemm_size or (8192 if gpu else 384), device)


def _try_memory(size: int, device: torch.device) -> None:
    block = torch.full((size,), _PATTERN, dtype=torch.uint8, device=device)
    if not bool((block == _PATTERN).all()):
        raise RuntimeError("memory does not hold what was written to it")


def _gemm_rate(size: int, device: torch.device) -> float:
    """Return the best rate of some products of two size x size matrices, FLOP/s: bf16 on accelerators, else float32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ones = torch.ones(size, size, dtype=dtype, device=device)
    # A row of k ones times a column of k ones is k, and a power of two is exact in bf16.
    exact = 2 ** (size.bit_length() - 1)
    if not bool((ones[:, :exact] @ ones[:exact] == exact).all()):
        raise RuntimeError("a matrix product has the wrong result")
    matrix = torch.randn(size, size, dtype=dtype, device=device)
    product = matrix @ ones
    seconds: list[float] = []
    while len(seconds) < _LEAST_PRODUCTS or sum(seconds) < _SECONDS_OF_GEMM:
        synchronize(device)
        started = time.perf_counter()
        torch.matmul(matrix, ones, out=product)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds)


def _reduce(own: Findings, size: int, device: torch.device) -> None:
    block = torch.ones(size * 2**18, device=device)
    synchronize(device)
    started = time.perf_counter()
    torch.distributed.all_reduce(block)
    synchronize(device)
    own.allreduce_gb_per_second[str(size)] = block.nbytes / (time.perf_counter() - started) / 1e9
    if float(block.min()) != float(block.max()) or float(block[0]) != torch.distributed.get_world_size():
        raise RuntimeError(f"an all-reduce of {size} MB has the wrong result")


def _timed(own: Findings, what: str, limit: float, work: Callable[[], None]) -> None:
    """Do `work` for at most `limit` seconds; note in `own` how it failed, if it did."""

    def run() -> None:
        try:
            work()
        except Exception as error:  # whatever a sick device says
            own.problem = f"{what} failed: {type(error).__name__}: {first_line(error)}"

    # In a thread of its own, since libraries that wait for a sick device or network cannot be interrupted.
    thread = threading.Thread(target=run, name="node check", daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        own.hung, own.problem = True, f"{what} did not end within {limit:g} s"


def _report(own: Findings, world: World, patience: float, stage: str) -> list[Findings]:
    """Return every rank's findings; if ranks do not come within `patience` and some grace, find out which."""
    if not world.meet(patience + _SECONDS_OF_GRACE):
        answers = roll_call(stage, own.problem or "waits", _SECONDS_OF_GRACE)
        if not answers:
            # Rank 0 keeps the roll: it is silent, or this rank is cut off, in which case rank 0 will say so first.
            time.sleep(_SECONDS_OF_GRACE)
        silent = [rank for rank in range(world.size) if rank not in answers] if answers else [0]
        hosts = [nodes_of_ranks()[rank] for rank in silent]
        named = ", ".join(f"rank {rank} on {host}" for rank, host in zip(silent[:_HOSTS_SHOWN], hosts, strict=False))
        raise UnhealthyNodeError(f"{stage}: no answer from {named}", hosts, silent=silent)
    own.clock = time.time()
    return world.allgather(own)


def _judge(world: World, every: Sequence[Findings], found: dict[int, str]) -> None:
    """Raise on every rank if a node failed; who waited in vain is to blame only if nobody else is."""
    if not found:
        return
    blamed = [rank for rank in sorted(found) if not every[rank].hung] or sorted(found)
    reasons = {each.host: "" for each in every}
    for rank in blamed:
        reasons[every[rank].host] = reasons[every[rank].host] or f"{every[rank].host}, rank {rank}: {found[rank]}"
    listed = [reason for reason in reasons.values() if reason]
    shown = "; ".join(listed[:_HOSTS_SHOWN]) + (
        f"; and {len(listed) - _HOSTS_SHOWN} more hosts" if listed[_HOSTS_SHOWN:] else ""
    )
    everywhere = len(reasons) > 1 and len(listed) == len(reasons)
    # A thread that hangs in a library keeps the process from a clean end.
    world.failed_together = not any(each.hung for each in every)
    raise UnhealthyNodeError(
        f"{shown} (on every host)" if everywhere else shown,
        [] if everywhere else [host for host, reason in reasons.items() if reason],
    )


def _record(each: Findings, skew: float) -> dict[str, Any]:
    return {
        "host": each.host,
        "device": each.device,
        "gemm_flops": each.gemm_flops,
        "peak_flops": each.peak_flops,
        "free_bytes": each.free_bytes,
        "clock_skew_seconds": skew,
        "allreduce_gb_per_second": each.allreduce_gb_per_second,
    }
