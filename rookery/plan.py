"""`rookery plan`: what every device of a run holds and computes, before anything is submitted."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="Path of a YAML file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    ranks: Annotated[int, typer.Option(help="Ranks (devices) of the run.")] = 1,
    ranks_per_node: Annotated[int | None, typer.Option(help="Ranks of a node.  [default: all]")] = None,
    memory_gb: Annotated[
        float | None, typer.Option("--memory-gb", help="Memory of a device in GB of 10^9 bytes: says what fits.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the memory that a rank needs with each policy of activation checkpointing, and the FLOPs of a step."""
    from pipeline.config import load_config
    from pipeline.plan import plan as plan_run

    per_node = ranks if ranks_per_node is None else ranks_per_node
    result = plan_run(load_config(config, overrides or []), ranks, per_node, memory_gb)
    if as_json:
        print(json.dumps(result))
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    state, console = result["state"], Console()
    facts = Table(
        title=f"{result['name']}: {result['ranks']:,} ranks, {result['ranks_per_node']} a node", show_header=False
    )
    rows = {
        "parameters": f"{result['parameters']:,}, {result['precision']}",
        "batch": f"{result['tokens_per_step']:,} tokens a step: {result['accumulation']} micro-batches a rank of"
        f" {result['micro_batch_size']} x {result['sequence_length']:,}",
        "FLOPs of a mean step": f"{result['model_flops']:.3e} of the model, of all ranks",
        "ZeRO over": f"{result['shards']:,} ranks",
        "weights": _gb(state["weights"]),
        "gradients": _gb(state["gradients"]),
        "master weights": _gb(state["master"]),
        "optimizer state": _gb(state["optimizer"]),
        "buckets": _gb(state["buckets"]),
        "of these in host memory": _gb(state["on_host"]),
        "logits, one copy": f"{_gb(result['logits'])} (part of the activations)",
    }
    for name, text in rows.items():
        facts.add_row(name, text)
    console.print(facts)
    table = Table(title=f"A rank's device at {result['backprop_depth']} iterations with gradient")
    for name in ("activation checkpointing", "each iteration", "activations", "total", "FLOPs of a sequence", "fits"):
        table.add_column(name, justify="left" if name.startswith("activation c") else "right")
    for name, policy in result["policies"].items():
        fits = "" if policy["fits"] is None else "yes" if policy["fits"] else "no"
        mark = " (configured)" if name == result["configured"] else ""
        sizes = (_gb(policy[key]) for key in ("iteration", "activations", "total"))
        table.add_row(name + mark, *sizes, f"{policy['flops']:.3e}", fits)
    console.print(table)
    console.print("Eager execution; fragmentation and the collective library's own buffers come on top.")


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
