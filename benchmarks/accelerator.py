"""Training throughput of one device: tokens a second, MFU, HFU and memory by model, policy, eager and compiled.

Measured: forward and backward pass of one micro-batch of synthetic tokens at the configuration's mean depth (n, k),
bf16 weights, no optimizer: on one device float32 master weights and moments of 3.5 B parameters do not fit beside the
rest, and across many ZeRO leaves a rank next to nothing of them. What runs out of memory is shown as such.
    python -m benchmarks.accelerator [--models huginn-3.5b huginn-1b] [--json FILE]
On a CPU: python -m benchmarks.accelerator --models tiny
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine, median, publish
from pipeline.accelerator import describe, forget_peak_memory, peak_flops, peak_memory, select_device, synchronize
from pipeline.compilation import compile_core
from pipeline.config import load_config
from pipeline.depth import Depth
from pipeline.flops import sequence_flops
from pipeline.model import RecurrentDepthModel
from pipeline.recompute import POLICIES

TINY = "smoke"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["huginn-3.5b", "huginn-1b"], help="shipped runs, or tiny")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--eager-only", action="store_true", help="do not compile")
    parser.add_argument("--mode", default="default", help="of torch.compile")
    parser.add_argument("--rows", type=int, default=1, help="sequences of the micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", "--json", type=Path, default=Path("runs/benchmarks/accelerator.json"))
    options = parser.parse_args()
    device = select_device(0)
    rows, records = [], []
    for name in options.models:
        for policy in options.policies:
            for compiled in (False,) if options.eager_only else (False, True):
                record = measure(name, policy, device, compiled=compiled, options=options)
                records.append(record)
                rows.append(_row(record))
                print(*rows[-1], flush=True)
    facts = {**describe(device), "peak_flops": peak_flops(device), **machine("torch")}
    header = ("model", "n + k", "policy", "core", "tokens/s", "MFU", "HFU", "memory GB", "ms")
    title = (
        f"Forward and backward pass on {facts['device']}, torch {torch.__version__}, bf16, {options.rows} sequence(s)"
    )
    publish(options.out, title, header, rows, {"machine": facts, "records": records})


def measure(
    name: str, policy: str, device: torch.device, *, compiled: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """Return what a pass took, or that it did not fit."""
    config = load_config(TINY if name == "tiny" else name)
    shape, length = config.model, config.model.block_size
    k = min(config.depth.mean_backprop_depth, config.depth.mean_recurrence)
    depth = Depth(config.depth.mean_recurrence + 1 - k, k)  # E[r] = mean + 1
    record: dict[str, Any] = {"model": name, "depth": list(depth), "policy": policy, "compiled": compiled}
    torch.compiler.reset()
    gc.collect()  # what the last measurement left
    forget_peak_memory(device)

    def build() -> tuple[RecurrentDepthModel, torch.Tensor, torch.Tensor]:
        with device:
            model = RecurrentDepthModel(shape, config.train.attention, policy).bfloat16()
        model.init_weights(0, config.depth.mean_recurrence)
        if compiled:
            compile_core(model, options.mode)
        ids = torch.randint(0, shape.vocab_size, (options.rows, length), device=device)
        return model, ids, model.initial_state(torch.arange(options.rows, device=device), length)

    def once(model: RecurrentDepthModel, ids: torch.Tensor, state: torch.Tensor) -> float:
        synchronize(device)
        started = time.perf_counter()
        model(ids, state, depth, ids.roll(-1, 1)).backward()
        synchronize(device)
        model.zero_grad()
        return time.perf_counter() - started

    try:
        built = build()
        record["first_seconds"] = once(*built)
        record["seconds"] = [once(*built) for _ in range(options.rounds)]
    except torch.OutOfMemoryError:
        record["seconds"] = None
    record["memory_bytes"] = peak_memory(device)
    if record["seconds"]:
        seconds, flops, peak = median(record["seconds"]), sequence_flops(shape, policy), peak_flops(device)
        record["tokens_per_second"] = options.rows * length / seconds
        for key, count in (("mfu", flops.model(depth)), ("hfu", flops.training(depth))):
            record[key] = None if peak is None else options.rows * count / seconds / peak
    return record


def _row(record: dict[str, Any]) -> list[str]:
    n, k = record["depth"]
    row = [record["model"], f"{n} + {k}", record["policy"], "compiled" if record["compiled"] else "eager"]
    if not record["seconds"]:
        return [*row, "out of memory", "", "", "", ""]
    memory = "" if record["memory_bytes"] is None else f"{record['memory_bytes'] / 1e9:.1f}"
    shares = ["" if record[key] is None else f"{record[key]:.1%}" for key in ("mfu", "hfu")]
    return [*row, f"{record['tokens_per_second']:.0f}", *shares, memory, f"{1e3 * median(record['seconds']):.0f}"]


if __name__ == "__main__":
    main()
