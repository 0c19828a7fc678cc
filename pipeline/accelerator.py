"""The only place that knows CUDA from ROCm from CPU. PyTorch's ROCm build answers to the name `cuda` too."""

from __future__ import annotations

import os
import platform
import re
import resource
import time

import psutil
import torch

from pipeline.errors import ConfigError

# Dense bf16 products of one device, a GCD where a card has two, in FLOP/s: the vendors' data sheets. The first name
# that a device's name contains as a word counts. Of H100's forms only these names are told apart.
_PEAK_FLOPS = {
    "MI355X": 2.5e15,
    "MI350X": 2.3e15,
    "MI325X": 1.307e15,
    "MI300X": 1.307e15,
    "MI300A": 9.806e14,
    "MI250X": 1.915e14,
    "MI250": 1.811e14,
    "MI210": 1.81e14,
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 9.894e14,
    "H200": 9.894e14,
    "H100 PCIe": 7.56e14,
    "H100 NVL": 8.35e14,
    "H100": 9.894e14,
    "A100": 3.12e14,
}
_FIRST_ROCM_THAT_HANGS = (7, 12)

Mark = float | torch.cuda.Event
"""A point in the work of a device."""


def select_device(local_rank: int) -> torch.device:
    """Return this rank's device and make it current.

    A scheduler that binds one device to each task shows every rank a single device, index 0; one that does not shows
    all of them, and the local rank chooses.

    Raises:
        ConfigError: fewer devices than ranks on this node.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} on {platform.node()} has no device: {count} are visible; start at most"
            f" {count} ranks on a node"
        )
    device = torch.device("cuda", 0 if count == 1 else local_rank)
    torch.cuda.set_device(device)
    return device


def visible_devices() -> int:
    """Return the number of GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of the whole host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def device_identity(device: torch.device) -> str | None:
    """Return what tells a device from the others of its node, whatever index it has in this process; None for CPUs."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def communication_backend(device: torch.device) -> str:
    """Return the collective library for tensors on `device`: NCCL (or RCCL under the same name) or gloo."""
    return "nccl" if device.type == "cuda" else "gloo"


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on `device`, so that a clock reads what it should."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def has_accelerator() -> bool:
    """Return whether this process sees a GPU."""
    return torch.cuda.is_available()


def runtime_version() -> str:
    """Return the version of ROCm or CUDA that this PyTorch was built for, "None" for neither."""
    return str(torch.version.hip or torch.version.cuda)


def architecture(device: torch.device) -> str:
    """Return what compiled code depends on: the GPU's architecture, or the CPU's vector instructions."""
    if device.type != "cuda":
        return str(torch.backends.cpu.get_cpu_capability())
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "gcnArchName", f"{properties.major}.{properties.minor}"))


def forget_peak_memory(device: torch.device) -> None:
    """Give unused memory of a GPU back and begin `peak_memory` anew; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def describe(device: torch.device) -> dict[str, str | None]:
    """Return what the run log says about a device; unknown facts are None."""
    if device.type != "cuda":
        return {"device": platform.processor() or platform.machine(), "vendor": "cpu", "runtime": None}
    vendor, runtime = ("amd", torch.version.hip) if torch.version.hip else ("nvidia", torch.version.cuda)
    return {"device": torch.cuda.get_device_name(device), "vendor": vendor, "runtime": runtime}


def peak_flops(device: torch.device) -> float | None:
    """Return the most bf16 FLOP/s that `device` can do in matrix products, None where nobody has looked it up."""
    if device.type != "cuda":
        return None
    return peak_of_name(torch.cuda.get_device_name(device))


def peak_of_name(name: str) -> float | None:
    """Return the peak of the device that the driver calls `name`, None if it is not in the table."""
    return next((peak for part, peak in _PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held at once: tensors of a GPU, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mark(device: torch.device) -> Mark:
    """Return a point in the work of `device` that `seconds_between` understands; does not wait for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Mark, second: Mark) -> float:
    """Return the time between two marks of one device; waits for the second."""
    if isinstance(first, float):
        assert isinstance(second, float)
        return second - first
    assert not isinstance(second, float)
    second.synchronize()
    return float(first.elapsed_time(second)) / 1e3


def sharding_problem(stage: int) -> str | None:
    """Return why this build of PyTorch cannot shard parameters (stage 3), or None."""
    if stage < 3 or torch.version.hip is None:
        return None
    major, minor = (int(part) for part in torch.version.hip.split(".")[:2])
    if (major, minor) < _FIRST_ROCM_THAT_HANGS:
        return None
    return (
        f"ROCm {major}.{minor} hangs in the all-gather of stage 3 (its RCCL registers buffers, ROCm/rocm-systems"
        " pull request 5751); use zero.stage=1 or 2, or an older ROCm"
    )
