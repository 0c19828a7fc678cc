"""The only place that knows CUDA from ROCm from CPU. PyTorch's ROCm build answers to the name `cuda` too."""

from __future__ import annotations

import os
import platform

import torch

from pipeline.errors import ConfigError


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


def describe(device: torch.device) -> dict[str, str | None]:
    """Return what the run log says about a device; unknown facts are None."""
    if device.type != "cuda":
        return {"device": platform.processor() or platform.machine(), "vendor": "cpu", "runtime": None}
    vendor, runtime = ("amd", torch.version.hip) if torch.version.hip else ("nvidia", torch.version.cuda)
    return {"device": torch.cuda.get_device_name(device), "vendor": vendor, "runtime": runtime}
